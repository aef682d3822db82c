"""Hydra's command line, with users' mistakes told in one line and exit code 2."""

import functools
import os
import shutil
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
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from src.config import CONF, check, nearest, nodes
from src.errors import UserError, say

# What Lightning says, and what to do about it.
FIXES = {
    "No supported gpu backend found": "no GPU was found; set trainer.accelerator=cpu, or auto for what there is",
    "can not run on your system": "set trainer.accelerator=auto for what there is",
}


def entry(config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """Makes a function of a config the program of its file."""

    def decorate(task: Callable[[DictConfig], Any]) -> Callable[[], None]:
        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            try:
                check(config)
                _check_added()
                return task(config)
            except Exception as error:
                line = explain(error)
                hydra_config = HydraConfig.get()
                if line is None or hydra_config.mode == RunMode.MULTIRUN:
                    raise
                _remove_if_empty(Path(hydra_config.runtime.output_dir))
                sys.exit(say(line))

        @functools.wraps(task)
        def program() -> None:
            before = os.environ.get("HYDRA_FULL_ERROR", "0")
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors itself, and exits with 1
            try:
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
            except Exception as error:
                line = explain(error)
                if line is None or before == "1":
                    raise
                sys.exit(say(line))
            finally:
                os.environ["HYDRA_FULL_ERROR"] = before

        return program

    return decorate


def explain(error: BaseException) -> str | None:
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
        return _unknown_key(text.split("'")[1], _known_keys(_chosen_groups()))
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {error.message.splitlines()[0]}; overrides look like key=value"
    if isinstance(error, HydraException | OmegaConfBaseException):
        cause = error.__cause__
        return f"{text} {' '.join(str(cause).split())}" if isinstance(cause, OmegaConfBaseException) else text
    if type(error).__name__ == "MisconfigurationException":  # by name: Lightning may not be imported yet
        fix = next((fix for found, fix in FIXES.items() if found in text), None)
        return fix or text
    return None


def _chosen_groups() -> list[str]:
    """The command line's group=option arguments that name a config there is."""
    pairs = (argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    return [f"{group}={option}" for group, option in pairs if (CONF / group / f"{option}.yaml").is_file()]


def _known_keys(overrides: list[str]) -> list[str]:
    """The groups, and the keys of the config that these overrides give."""
    composing = GlobalHydra.instance().is_initialized()  # within a job; not after a composition that failed
    with nullcontext() if composing else hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose("train", overrides=overrides)
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
