"""digitlab: src.load returns a trained network; each program is a module of its own, run with python -m."""

import importlib.util
import signal
import sys
from typing import Any

from src.core import errors

if sys.argv[0] == "-m":  # until Python has found the program that is to run, whose imports come first
    if not importlib.util.find_spec("hydra"):
        fix = "make train installs them into .venv; then type source .venv/bin/activate"
        sys.exit(errors.print_error(f"{sys.executable} lacks the packages of this project; {fix}"))
    for number in signal.SIGINT, signal.SIGTERM:
        signal.signal(number, errors.exit_on_signal)


def load(path: Any = None, **options: Any) -> Any:
    """Load a run folder, a checkpoint or a .pt file; by default the shipped weights. See src.training.predictor.load.

    A classifier of images is returned as a Predictor: `predictor.predict_file(image)` answers for a file or its bytes,
    and `predictor(batch)` maps [N, C, H, W] pixels from 0 to 255 to log-probabilities. Any other task is returned as
    its LightningModule.
    """
    from src.core.process import import_lightning  # most programs should not wait for PyTorch

    import_lightning()
    from src.training import predictor

    return predictor.load(path, **options)
