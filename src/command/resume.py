"""Continuing a run or a sweep: what to type for it, and what is then read."""

import os
import shlex
import sys
from pathlib import Path

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from src.errors import UserError

OWN_CONFIG = ".hydra/config.yaml"


def resuming(arguments: list[str], resumed: str) -> list[str]:
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


def read_config(file: Path) -> DictConfig:
    """A run's config as it was written. Raises UserError."""
    try:
        config = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise UserError(f"{file} is damaged: it is not the config of a run")
    return config


def own_config(config: DictConfig) -> DictConfig:
    """The config of the run that is resumed, in the place of the one composed for its command."""
    file = Path(config.resume, OWN_CONFIG)
    own = read_config(file)
    for key in map(str, config.keys() - {"resume"}):
        if key not in own or not (OmegaConf.is_dict(config[key]) <= OmegaConf.is_dict(own[key]) or own[key] is None):
            raise UserError(f"{file} is damaged: {key} is missing or has another form")
    own.resume, own.output_dir = config.resume, config.output_dir
    return own


def say_how_to_continue(folder: Path, signal: str) -> None:
    if (folder / OWN_CONFIG).is_file():
        command = f"python -m src.train resume={shlex.quote(os.path.relpath(folder))}"
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            command = continue_command(Path(HydraConfig.get().sweep.dir, "multirun.yaml"))
        print(f"\nstopped by {signal}; continue with: {command}", file=sys.stderr)
    else:
        print(f"\nstopped by {signal}", file=sys.stderr)


def continue_command(multirun: Path) -> str:
    """The command that the sweep was started with, and the switch that makes it continue."""
    overrides = yaml.safe_load(multirun.read_text())["hydra"]["overrides"]
    own = ("hydra.mode=", "hydra.sweep.dir=", "hydra.job.config.override_dirname.exclude_keys=")
    hydra = [one for one in overrides["hydra"] if not one.startswith(own)]
    flag = ["-m"] if "hydra.mode=MULTIRUN" in overrides["hydra"] else []
    folder = f"hydra.sweep.dir={multirun.parent}"
    return shlex.join(["python", "-m", "src.train", *flag, *overrides["task"], *hydra, folder])
