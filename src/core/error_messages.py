"""Users' mistakes in one line."""

import errno
import shlex
import sys
from typing import Any

from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    MissingConfigException,
    OverrideParseException,
)
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.core.compat import get_composed_config
from src.core.config import CONF, find_closest, iterate_items
from src.core.errors import UserError

# What Lightning and PyTorch say, and what to do about it.
FIXES = {
    "No supported gpu backend found": "no GPU was found; set trainer.accelerator=cpu, or auto for what there is",
    "can not run on your system": "set trainer.accelerator=auto for what there is",
    "does not allow for gradient clipping": "a fused optimizer cannot clip with trainer.precision=16-mixed; leave "
    "optimizer.fused out, or set trainer.gradient_clip_val=null",
    "SyncBatchNorm layers only work with GPU": "trainer.sync_batchnorm=true needs GPUs; set it to false",
    "Unsupported Bicubic interpolation": "this PyTorch has no bicubic interpolation on mps; set "
    "data.augment.interpolation=bilinear, or trainer.accelerator=cpu",
    "MPS framework doesn't support float64": "mps has no 64-bit numbers; set trainer.accelerator=cpu",
}
# What devices say: PyTorch's allocators, CUDA, cuBLAS and cuDNN, the CPU's.
OUT_OF_MEMORY = "out of memory", "_STATUS_ALLOC_FAILED", "can't allocate memory"
# The disk says these; what to do about them is the same everywhere.
DISK = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR, errno.EEXIST),
    *(errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
}
PEER_LOST = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"


def describe_error(error: BaseException, batch_size: Any = None) -> str | None:
    """One line for a mistake of the user's, None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if any(words in text for words in OUT_OF_MEMORY):
        return f"out of memory with data.batch_size={batch_size}; halve it"
    if fix := next((fix for found, fix in FIXES.items() if found in text), None):
        return fix
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError | ValueError):
            return " ".join(str(cause or error).split())
        return describe_error(cause)
    if isinstance(error, ConfigCompositionException) and text.startswith("Could not delete from config. '"):
        return describe_unknown_key(text.split("'")[1], [])
    if isinstance(error, ConfigCompositionException) and text.startswith("Could not override '"):
        return describe_unknown_key(text.split("'")[1], list_keys(get_composed_config(error)))
    if isinstance(error, MissingConfigException) and error.options:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        guess = find_closest(option, list(error.options))
        meant = f"did you mean {guess}? " if guess else ""
        return f"{group}={option}: there is no such option; {meant}there are {', '.join(error.options)}"
    if isinstance(error, ConfigCompositionException) and text.startswith("Ambiguous value for argument"):
        key, _, values = text.split("'")[1].partition("=")
        return f"{key}={values}: several values are a run each with -m; a list is {key}=[{values}]"
    if isinstance(error, OverrideParseException) and error.override.count("[") != error.override.count("]"):
        argument = error.override
        for part in sys.argv[sys.argv.index(argument) + 1 :] if argument in sys.argv else []:
            argument += f" {part}" * (argument.count("[") != argument.count("]"))
        closed = argument.count("[") == argument.count("]")
        fix = f"a value with spaces needs quotes: {shlex.quote(argument)}" if closed else "close it"
        return f"{error.override}: a bracket is open; {fix}"
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {error.message.splitlines()[0]}; overrides look like key=value"
    if isinstance(error, ValueError) and text.startswith("Config group override must be"):
        return "a group takes the name of one of its options, not null; there is scheduler=none and logger=none"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        return f"{text} {' '.join(str(cause).split())}" if isinstance(cause, OmegaConfBaseException) else text
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room, or set hydra.run.dir=… to a folder that can be written"
    if "Error(s) in loading state_dict" in text:
        return "the checkpoint does not fit the network of the config; use the two as they were written together"
    if type(error).__module__ in ("sqlalchemy.exc", "optuna.exceptions"):  # by name: not everyone has them
        return f"the study cannot be used ({text.partition(' (Background')[0]}); begin another with study_name=NAME"
    # By name: Lightning may not be imported yet.
    if type(error).__name__ == "MisconfigurationException" or (type(error) is ValueError and _by_lightning(error)):
        return text
    return None


def _by_lightning(error: BaseException) -> bool:
    """Whether a function of Lightning's raised it: of a setting that it found out late."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    return place is not None and place.tb_frame.f_globals.get("__name__", "").startswith("lightning.pytorch.")


def describe_lost_process(error: BaseException) -> str | None:
    """A line where it was another process of the run that failed."""
    if not any(words in str(error) for words in PEER_LOST):
        return None
    return f"another process of this run has ended: {str(error).splitlines()[0]}"


def list_keys(config: DictConfig) -> list[str]:
    """The keys of a config, without Hydra's own, and the groups."""
    keys = [key for key, _ in iterate_items(OmegaConf.to_container(config)) if key.partition(".")[0] != "hydra"]
    return keys + [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def describe_unknown_key(key: str, known: list[str], value: str = "") -> str:
    """`value`: with the = before it, to be said with the key that is meant."""
    guess = find_closest(key, known)
    return f"{key}: there is no such key; " + (
        f"did you mean {guess}{value}?" if guess else "python -m src.train --help shows all keys"
    )
