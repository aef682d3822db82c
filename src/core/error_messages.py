"""Describe errors of Hydra, OmegaConf, Lightning, PyTorch and the disk as one line that names the fix."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from io import TextIOWrapper
from traceback import walk_tb
from typing import Any

from src.core.errors import UserError, print_error, print_warnings_in_one_line

FIXES = {
    "No supported gpu backend found": "no GPU was found; set trainer.accelerator=cpu or auto",
    "Error(s) in loading state_dict": "the checkpoint does not fit the config's network; use those of one run",
    "Config group override must be": "a config group takes an option's name, as logger=none, scheduler=none or ~model",
    "Failed to import DB access module": "storage: install the driver of its database, as pip install psycopg",
    "out of shared memory": "data.num_workers: /dev/shm is too small; use fewer, or docker run --shm-size=2g",
    "DataLoader timed out": "data.num_workers: /dev/shm or memory is too small; use fewer, or docker run --shm-size=2g",
}
OUT_OF_MEMORY = "out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory"
LOST_PEER = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"
# Packages whose functions raise for settings that they check late.
LATE_CHECKS = {"lightning.pytorch.": "trainer", "torch.optim.lr_scheduler": "scheduler", "torch.optim.": "optimizer"}


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
        if any(text in str(error) for text in LOST_PEER):
            print_error(f"another process of this run has ended: {str(error).splitlines()[0]}")
            sys.exit(1)
        if (line := describe_error(error)) is None:
            raise
        sys.exit(print_error(line))


def describe_error(error: BaseException, batch_size: Any = None) -> str | None:
    """Return one line for a user's mistake, None for a bug."""
    text, module = " ".join(str(error).split()), type(error).__module__  # a name: not every program imports Hydra
    if isinstance(error, UserError):
        return text.rpartition("UserError: ")[2]  # a DataLoader's worker process adds its traceback
    if any(words in text for words in OUT_OF_MEMORY):
        return f"data.batch_size={batch_size}: out of memory; halve it"
    if fix := next((fix for words, fix in FIXES.items() if words in text), None):
        return fix
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        file = f"{error.filename}: " if error.filename is not None else ""
        fix = "; free some space, or set hydra.run.dir=… to a folder that can be written"
        return f"{file}{error.strerror}" + fix * (not isinstance(error, FileNotFoundError))
    if module.startswith(("hydra.", "omegaconf.")):
        return _describe_hydra_error(error, text)
    if mark := getattr(error, "problem_mark", None):  # PyYAML's
        problem = error.problem  # type: ignore[attr-defined]
        return f"{mark.name}, line {mark.line + 1}: {problem}; indent by spaces, close brackets and quotes"
    if module in ("sqlalchemy.exc", "optuna.exceptions"):
        reason = text.partition(" (Background")[0]
        return f"storage: the study cannot be used ({reason}); type study_name=NAME for a new one"
    if (package := module.partition(".")[0]) in ("wandb", "mlflow"):
        return f"logger={package}: {text}; or set logger=tensorboard"
    modules = ["", *(frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))]
    origin = modules[-1]
    if isinstance(error, AttributeError) and "lightning.pytorch.callbacks.finetuning" in modules:
        return f"BackboneFinetuning: {text}; 'callbacks=[default,freeze]' freezes layers of any task"
    key = next((key for package, key in LATE_CHECKS.items() if origin.startswith(package)), None)
    if key and isinstance(error, ValueError | RuntimeError):
        return f"{key}: {text}"
    return text if type(error).__name__ == "MisconfigurationException" else None


def _describe_hydra_error(error: BaseException, text: str) -> str | None:
    from hydra.errors import InstantiationException, MissingConfigException, OverrideParseException
    from omegaconf import DictConfig, OmegaConf

    from src.core.allowed_targets import get_parameters
    from src.core.compat import get_composed_config
    from src.core.config import CONF, describe_unknown_key, find_closest, list_keys

    cause = error.__cause__
    if isinstance(error, InstantiationException):
        return text if cause is None or isinstance(cause, TypeError | ValueError) else describe_error(cause)
    if isinstance(error, MissingConfigException):
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        options = list(error.options or sorted(file.stem for file in (CONF / group).glob("*.yaml")))
        closest = find_closest(option, options)
        hint = f"did you mean {closest}? " if closest else ""
        return f"{group or '--config-name'}={option}: no such option; {hint}there are {', '.join(options)}"
    if match := re.match(r"(In '(.*?)': )?Could not (delete|override)[^']*'(.*?)'", text):
        composed = get_composed_config(error) if match[3] == "override" else DictConfig({})
        known = list_keys(composed) if match[3] == "override" else []
        node, _, name = match[4].rpartition(".")
        is_typo = get_close_matches(match[4], known, cutoff=0.9)  # known without importing the class
        target = None if is_typo else OmegaConf.select(composed, f"{node}._target_")
        if target and name in get_parameters(target):
            return f"{match[4]}: is not in the YAML file; type +{match[4]}=… to add it"
        if match[4] in known:
            return f"{match[4]}: a key of this value is new; to replace it, type ~{match[4]} '+{match[4]}={{…}}'"
        line = describe_unknown_key(match[4], known)
        return f"conf/{match[2]}.yaml: {line}" if match[2] else line
    if match := re.match(r"Ambiguous value for argument '(.*?)=(.*)' 1\.", text):
        key, values = match.groups()
        return f"{key}={values}: several values; add -m for one run per value, or type a list as {key}=[{values}]"
    if isinstance(error, OverrideParseException):
        has_open_bracket = error.override.count("[") != error.override.count("]")
        fix = "quote a list with spaces: 'key=[a, b]'" if has_open_bracket else "overrides look like key=value"
        return f"{error.override}: {error.message.splitlines()[0]}; {fix}"
    is_omegaconf_cause = type(cause).__module__.startswith("omegaconf.")
    return f"{text} {' '.join(str(cause).split())}" if is_omegaconf_cause else text
