"""What every worker of a sweep needs, imported once: each is forked from the process that did it."""

from src.core.process import import_lightning

import_lightning()

from src.data import datamodule  # noqa: E402, F401
from src.models import classifier, cnn  # noqa: E402, F401
from src.training import checkpoints, console, instantiate, resume, run_record, tensorboard  # noqa: E402, F401
