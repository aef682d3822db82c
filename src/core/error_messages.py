"""Describe errors of Hydra, OmegaConf, Lightning, PyTorch and the disk as one line that names the fix."""

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any

from src.core.errors import UserError, print_error, print_warnings_in_one_line
from src.core.process import exit_on_signals

FIXES = {
    "No supported gpu backend found": "no GPU was found; set trainer.accelerator=cpu or auto",
    "can not run on your system": "trainer.accelerator is not available here; set trainer.accelerator=auto",
    "does not allow for gradient clipping": "a fused optimizer cannot clip with trainer.precision=16-mixed; leave out "
    "optimizer.fused or set trainer.gradient_clip_val=null",
    "SyncBatchNorm layers only work with GPU": "trainer.sync_batchnorm=true needs GPUs; set it to false",
    "Unsupported Bicubic interpolation": "this PyTorch has no bicubic interpolation on mps; set "
    "data.augment.interpolation=bilinear or trainer.accelerator=cpu",
    "MPS framework doesn't support float64": "mps has no 64-bit floats; set trainer.accelerator=cpu",
    "Error(s) in loading state_dict": "the checkpoint does not fit the network of the config; use a config and a "
    "checkpoint of the same run",
    "Config group override must be": "a config group takes one of its options; type scheduler=none or logger=none",
}
OUT_OF_MEMORY = "out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory"
LOST_PEER = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"
DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EEXIST),
    *(errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Run a program: report a user's mistake as one line with exit code 2, let a bug raise with its traceback."""
    print_warnings_in_one_line()
    with exit_on_signals():
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
            line = describe_error(error)
            if line is None:
                raise
            sys.exit(print_error(line))


def describe_error(error: BaseException, batch_size: Any = None) -> str | None:
    """Return one line for a user's mistake, None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if any(words in text for words in OUT_OF_MEMORY):
        return f"data.batch_size={batch_size}: out of memory; halve it"
    if fix := next((fix for words, fix in FIXES.items() if words in text), None):
        return fix
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        file = f"{error.filename}: " if error.filename else ""
        return f"{file}{error.strerror}; free some space, or set hydra.run.dir=… to a folder that can be written"
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    # By their modules' names, because not every program imports Hydra, Lightning or Optuna.
    module = type(error).__module__
    if module.startswith(("hydra.", "omegaconf.")):
        return _describe_hydra_error(error, text)
    if module in ("sqlalchemy.exc", "optuna.exceptions"):
        reason = text.partition(" (Background")[0]
        return f"storage: the study cannot be used ({reason}); type study_name=NAME for a new one"
    if type(error).__name__ == "MisconfigurationException" or (type(error) is ValueError and _is_from_lightning(error)):
        return text
    return None


def _describe_hydra_error(error: BaseException, text: str) -> str | None:
    from hydra.errors import (
        ConfigCompositionException,
        InstantiationException,
        MissingConfigException,
        OverrideParseException,
    )

    from src.core.compat import get_composed_config
    from src.core.config import find_closest

    cause = error.__cause__
    if isinstance(error, InstantiationException):
        if cause is None or isinstance(cause, TypeError | ValueError):
            return " ".join(str(cause or error).split())
        return describe_error(cause)
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        match = find_closest(option, list(error.options))
        hint = f"did you mean {match}? " if match else ""
        return f"{group}={option}: no such option; {hint}there are {', '.join(error.options)}"
    if isinstance(error, ConfigCompositionException) and text.startswith(("Could not delete", "Could not override '")):
        known = list_keys(get_composed_config(error)) if "override" in text else []
        return describe_unknown_key(text.split("'")[1], known)
    if isinstance(error, ConfigCompositionException) and text.startswith("Ambiguous value for argument"):
        key, _, values = text.split("'")[1].partition("=")
        return f"{key}={values}: several values; add -m for one run per value, or type a list as {key}=[{values}]"
    if isinstance(error, OverrideParseException):
        has_open_bracket = error.override.count("[") != error.override.count("]")
        fix = "quote a list with spaces: 'key=[a, b]'" if has_open_bracket else "overrides look like key=value"
        return f"{error.override}: {error.message.splitlines()[0]}; {fix}"
    is_omegaconf_cause = type(cause).__module__.startswith("omegaconf.")
    return f"{text} {' '.join(str(cause).split())}" if is_omegaconf_cause else text


def _is_from_lightning(error: BaseException) -> bool:
    """Return whether a function of Lightning raised the error, because of a setting that it checks late."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("lightning.pytorch.")


def list_keys(config: Any) -> list[str]:
    """Return the keys of a config, without Hydra's own, and the config groups."""
    from omegaconf import OmegaConf

    from src.core.config import CONF, iterate_items

    keys = [key for key, _ in iterate_items(OmegaConf.to_container(config)) if key.partition(".")[0] != "hydra"]
    return keys + [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def describe_unknown_key(key: str, known: list[str]) -> str:
    """Return a line that names the closest known key."""
    from src.core.config import find_closest

    if re.search(r"(^|\.)(ckpt(_path)?|checkpoint|resume_from_checkpoint|pretrained)$", key):
        return f"{key}: no such key; init_from=PATH starts a new run from weights, resume=RUN continues a run"
    match = find_closest(key, known)
    return f"{key}: no such key; " + (
        f"did you mean {match}?" if match else "python -m src.train --help lists all keys"
    )
