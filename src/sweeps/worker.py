"""What every worker of a sweep needs, imported once: each is forked from the process that did it."""

from src.command.process import load_lightning

load_lightning()

from src.data import images  # noqa: E402, F401
from src.models import classifier, cnn  # noqa: E402, F401
from src.runs import build, checkpoints, console, dashboard, recovery, results  # noqa: E402, F401
