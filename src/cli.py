"""Hydra's command line, with users' mistakes told in one line and exit code 2."""

import errno
import functools
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    InstantiationException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.config import CONF, check, nearest, nodes
from src.errors import UserError, say
from src.process import isolated, stoppable
from src.sweeps.jobs import continue_command

# What Lightning says, and what to do about it.
FIXES = {
    "No supported gpu backend found": "no GPU was found; set trainer.accelerator=cpu, or auto for what there is",
    "can not run on your system": "set trainer.accelerator=auto for what there is",
}
STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM
OWN_CONFIG = ".hydra/config.yaml"
INTERACTIVE = None, "bash", "interactive"  # as Lightning sees it: Slurm has started one process here
# The disk says these; what to do about them is the same everywhere.
DISK = errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENOTDIR

PEER_LOST = "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited"


def entry(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Makes a function of a config the program of its file."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            hydra_config = HydraConfig.get()
            folder = Path(hydra_config.runtime.output_dir)
            resumed = config.get("resume")
            try:
                if resumed:
                    config = _own_config(config)
                check(config)
                _check_added()
                if hydra_config.mode == RunMode.MULTIRUN:
                    if (folder / "metrics.json").exists():
                        print(f"finished before: {folder.name}", flush=True)
                        return None
                    # From its last checkpoint, if an earlier start of this sweep left one.
                    config.resume = str(folder)
                with isolated():
                    return task(config)
            except SystemExit as stop:
                if stop.code in STOPPED and os.environ.get("LOCAL_RANK", "0") == "0":
                    _say_how_to_continue(folder, stop.code)
                raise
            except Exception as error:
                line = explain(error)
                if _out_of_memory(error):
                    line = f"out of memory with data.batch_size={OmegaConf.select(config, 'data.batch_size')}; halve it"
                if any(words in str(error) for words in PEER_LOST):
                    print(
                        f"error: another process of this run has ended: {str(error).splitlines()[0]}", file=sys.stderr
                    )
                    sys.exit(1)
                if line is None:
                    raise
                if hydra_config.mode == RunMode.MULTIRUN:
                    raise error if isinstance(error, UserError) else UserError(line) from error
                if not resumed:
                    _remove_if_empty(folder)
                sys.exit(say(line))

        @functools.wraps(task)
        def program() -> None:
            before, arguments = os.environ.get("HYDRA_FULL_ERROR", "0"), sys.argv
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors itself, and exits with 1
            try:
                with stoppable():
                    sys.argv = [arguments[0], *_prepare(arguments[1:])]
                    hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
            except Exception as error:
                line = explain(error, config_name)
                if line is None or before == "1":
                    raise
                sys.exit(say(line))
            finally:
                os.environ["HYDRA_FULL_ERROR"], sys.argv = before, arguments

        return program

    return decorate


def _prepare(arguments: list[str]) -> list[str]:
    """Arguments as a shell completes them, made such that Hydra understands them."""
    arguments = [_quoted(argument) for argument in arguments]
    resumed = [argument for argument in arguments if argument.startswith("resume=")]
    if resumed:
        return _resume(arguments, resumed[0])
    # Whoever starts the processes himself has to name the folder: the default has the time in it.
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) if os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE else 1
    several = max(tasks, int(os.environ.get("WORLD_SIZE", 1))) > 1
    named = any(argument.startswith(("hydra.run.dir=", "-m", "--multirun", "--cfg")) for argument in arguments)
    if several and not named:
        raise UserError("several processes write into one run folder; set hydra.run.dir=… to the same for each")
    return arguments


def _quoted(argument: str) -> str:
    """Quotes a value that is a path with characters which Hydra's grammar gives a meaning, as optimizer.lr=0.1."""
    key, _, value = argument.partition("=")
    special = re.search(r"[^\w./~+:%@-]", value)
    if not re.fullmatch(r"[\w.+@/]+", key) or not special or not Path(value).expanduser().exists():
        return argument
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _resume(arguments: list[str], resumed: str) -> list[str]:
    """The arguments that continue a run in its folder, which has its config."""
    value = OverridesParser.create().parse_override(resumed).value()
    folder = Path(str(value))
    others = [argument for argument in arguments if not argument.startswith(("resume=", "hydra."))]
    if {"-m", "--multirun"} & set(others):
        raise UserError("resume=… continues one run; leave out -m")
    if others:
        raise UserError(f"resume=… continues with the run's own config; leave out {' '.join(others)}")
    if not (folder / OWN_CONFIG).is_file():
        raise UserError(f"resume={value}: not the folder of a run ({OWN_CONFIG} is not there)")
    if (folder / "metrics.json").exists():
        print(f"{value} is finished: its scores are in metrics.json")
        sys.exit()
    if any(argument.startswith("hydra.run.dir=") for argument in arguments):  # DDP's other processes have it
        return arguments
    run_dir = resumed.replace("resume=", "hydra.run.dir=", 1)
    return [*arguments, run_dir, "hydra.output_subdir=null"]


def _own_config(config: DictConfig) -> DictConfig:
    """The config of the run that is resumed."""
    file = Path(config.resume, OWN_CONFIG)
    try:
        own = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    for key in map(str, config.keys() - {"resume"}):
        part = own.get(key) if isinstance(own, DictConfig) else None
        if (
            not isinstance(own, DictConfig)
            or key not in own
            or isinstance(config[key], DictConfig) > isinstance(part, DictConfig)
        ):
            raise UserError(f"{file} is damaged: {key} is missing or has another form")
    assert isinstance(own, DictConfig)
    own.resume, own.output_dir = config.resume, config.output_dir
    OmegaConf.set_struct(own, True)
    return own


def _say_how_to_continue(folder: Path, code: int) -> None:
    name = signal.Signals(code - 128).name
    if (folder / OWN_CONFIG).is_file():
        command = f"python -m src.train resume={shlex.quote(os.path.relpath(folder))}"
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            command = continue_command(Path(HydraConfig.get().sweep.dir, "multirun.yaml"))
        print(f"\nstopped by {name}; continue with: {command}", file=sys.stderr)
    else:
        print(f"\nstopped by {name}", file=sys.stderr)


def _out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def explain(error: BaseException, config_name: str = "train") -> str | None:
    """One line for a mistake of the user's, None for a bug."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, InstantiationException):
        cause = error.__cause__
        if cause is None or isinstance(cause, TypeError | ValueError):
            return " ".join(str(cause or error).split())
        return explain(cause)
    if isinstance(error, ConfigCompositionException) and text.startswith("Could not override '"):
        return _unknown_key(text.split("'")[1], _known_keys(_chosen_groups(), config_name))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {error.message.splitlines()[0]}; overrides look like key=value"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        return f"{text} {' '.join(str(cause).split())}" if isinstance(cause, OmegaConfBaseException) else text
    if isinstance(error, OSError) and error.errno in DISK:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room, or set hydra.run.dir=… to a folder that can be written"
    if "Error(s) in loading state_dict" in text:
        return "the checkpoint does not fit the network of the config; use the two as they were written together"
    if type(error).__name__ == "MisconfigurationException":  # by name: Lightning may not be imported yet
        fix = next((fix for found, fix in FIXES.items() if found in text), None)
        return fix or text
    return None


def _chosen_groups() -> list[str]:
    """The command line's group=option arguments that name a config there is."""
    pairs = (argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    return [f"{group}={option}" for group, option in pairs if (CONF / group / f"{option}.yaml").is_file()]


def _known_keys(overrides: list[str], config_name: str = "train") -> list[str]:
    """The groups, and the keys of the config that these overrides give."""
    composing = GlobalHydra.instance().is_initialized()  # within a job; not after a composition that failed
    with nullcontext() if composing else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(config_name, overrides=overrides)
    return [key for key, _ in nodes(config)] + [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def _unknown_key(key: str, known: list[str]) -> str:
    guess = nearest(key, known)
    return f"{key}: there is no such key; " + (
        f"did you mean {guess}?" if guess else "python -m src.train --cfg job shows all keys"
    )


def _check_added() -> None:
    """Refuses +key=value where a known key was meant: Hydra recommends that form for every typing mistake."""
    overrides = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    added = {override.key_or_group for override in overrides if override.is_add()}
    if not added:
        return
    known = _known_keys([str(override.input_line) for override in overrides if not override.is_add()])
    for key in sorted(added - set(known)):
        parent, _, _ = key.rpartition(".")
        siblings = [name for name in known if name.rpartition(".")[0] == parent]
        if not parent or nearest(key, siblings, cutoff=0.8):
            raise UserError(_unknown_key(key, known))


def _remove_if_empty(folder: Path) -> None:
    """A run that never began leaves no folder: Hydra has written its config there and an empty log."""
    left = [file for file in folder.rglob("*") if file.is_file() and file.parent.name != ".hydra"]
    if all(file.stat().st_size == 0 for file in left):
        shutil.rmtree(folder)
