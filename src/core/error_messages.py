"""Describe errors of Hydra, OmegaConf, Lightning, PyTorch and the disk as one line that names the fix."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from traceback import walk_tb

from src.core.errors import UserError, print_error, print_warnings_in_one_line

FIXES = {
    "Config group override must be": "a config group takes the name of an option, as logger=none",
    "No supported gpu backend": "no GPU was found; set trainer.accelerator=cpu or auto",
    "in loading state_dict": "the checkpoint does not fit the config's network; use those of one run",
    "Failed to import DB access module": "storage: install the driver of its database, as pip install psycopg",
    "Expected more than 1 value per channel": "batch norm cannot train on one image; change data.batch_size",
    "out of shared memory|DataLoader timed out": "data.num_workers: use fewer, or docker run --shm-size=2g",
    "out of memory|_STATUS_ALLOC_FAILED|can't allocate memory": "out of memory; halve data.batch_size",
}
# Packages whose errors, or whose functions that raise, belong to a setting.
SETTINGS = {
    "lightning.": "trainer",
    "torch.optim.lr_scheduler": "scheduler",
    "torch.optim.": "optimizer",
    "sqlalchemy.exc": "storage",
    "optuna.exceptions": "storage",
    "wandb.": "logger",
    "mlflow.": "logger",
    "matplotlib.": "figure",
}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Run a program: report a user's mistake as one line with exit code 2, let a bug raise with its traceback."""
    print_warnings_in_one_line()
    try:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as `head` does; nothing more can be printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (line := describe_error(error)) is None:
            raise
        sys.exit(print_error(line))


def describe_error(error: BaseException) -> str | None:
    """Return one line for a user's mistake, None for a bug."""
    text, module = " ".join(str(error).split()), type(error).__module__  # a name: not every program imports Hydra
    if isinstance(error, UserError):
        return text.rpartition("UserError: ")[2]  # a DataLoader's worker process adds its traceback
    if fix := next((fix for pattern, fix in FIXES.items() if re.search(pattern, text)), None):
        return fix
    if isinstance(error, OSError) and error.strerror and not isinstance(error, BrokenPipeError):
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    if module.startswith(("hydra.", "omegaconf.")):
        return _describe_hydra_error(error, text)
    if mark := getattr(error, "problem_mark", None):  # PyYAML's
        return f"{mark.name}, line {mark.line + 1}: {error.problem}"  # type: ignore[attr-defined]
    places = [module]
    if error.__traceback__ and isinstance(error, ValueError | RuntimeError):  # some settings are checked late
        *_, (frame, _) = walk_tb(error.__traceback__)
        places.append(frame.f_globals.get("__name__", ""))
    key = next((key for package, key in SETTINGS.items() if any(place.startswith(package) for place in places)), None)
    return f"{key}: {text}" if key else None


def _describe_hydra_error(error: BaseException, text: str) -> str:
    from omegaconf.errors import OmegaConfBaseException

    from src.core.compat import get_composed_config
    from src.core.config import describe_unknown_key, list_keys

    if match := re.match(r"(In '(.*?)': )?Could not (delete|override)[^']*'(.*?)'", text):
        file, key = match[2], match[4]
        known = list_keys(get_composed_config(error))
        if key in known:
            return f"{key}: a key of this value is new; to replace it, type ~{key} '+{key}={{…}}'"
        line = describe_unknown_key(key, known)
        return f"conf/{file}.yaml: {line}" if file else line
    text = text.partition(" Config search path:")[0]
    return f"{text} {error.__cause__}" if isinstance(error.__cause__, OmegaConfBaseException) else text
