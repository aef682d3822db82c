"""digitlab: src.load gives a trained network; each main is a module of its own, run with python -m."""

import gc
import importlib.util
import signal
import sys
from typing import Any

from src.core import errors

if sys.argv[0] == "-m":  # as Python has it until the program that is to run has been found: its imports come first
    if sys.version_info < (3, 11) or not importlib.util.find_spec("hydra"):
        lacks = "is older than 3.11" if sys.version_info < (3, 11) else "lacks the packages of this project"
        sys.exit(
            errors.print_error(
                f"{sys.executable} {lacks}; make train brings them into .venv: source .venv/bin/activate"
            )
        )
    if {"-h", "--help"} & {*sys.argv}:
        gc.disable()  # a sixth of what --help takes
    signal.signal(signal.SIGINT, errors.raise_system_exit)
    signal.signal(signal.SIGTERM, errors.raise_system_exit)


def load(path: Any = None, **options: Any) -> Any:
    """The Reader, see src.training.predictor, of a run folder, a checkpoint in one, or a .pt file; by default, as shipped.

    `reader.read(picture)` answers for a file or its bytes; `reader(batch)` maps [N, C, H, W] pixels from 0 to 255 to
    log-probabilities.
    """
    from src.core.process import import_lightning  # here, because most mains should not wait for PyTorch

    import_lightning()
    from src.training.predictor import load_predictor

    return load_predictor(path, **options)
