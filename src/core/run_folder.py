"""Continuing a run or a sweep: what to type for it, and what is then read."""

import hashlib
import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from src.core.config import iterate_items
from src.core.errors import UserError
from src.core.files import write_atomically

CONFIG_FILE = ".hydra/config.yaml"
OUTPUT_DIR = "${hydra:runtime.output_dir}"
# What a run's config may refer to: its own keys, and what conf/ itself looks up.
OWN_REFERENCE = re.compile(r"(\$\{[\w.]+\}|\$\{hydra:runtime\.output_dir\}|\$\{oc\.env:MNIST_ROOT,data\}|[^$])*")
WRITTEN = "dirpath", "save_dir", "default_root_dir", "log_dir", "root_dir", "dir", "exclude_batches_path"
WRITERS = "callbacks.", "logger.", "trainer."
EXPANDED = re.compile(r"~|.*(\$\w|%\w+%|::)", re.DOTALL)  # what Lightning makes other paths and addresses of
ELSEWHERE = "trainer.accelerator="  # a run may be continued on a machine that lacks its GPU
MAX_BYTES = 1_000_000
MAX_DIGITS = re.compile(r"[\da-fA-F_:]{1000}")  # 1:30:00 is a number in YAML, and such a one takes minutes
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast


def parse_resume_arguments(arguments: list[str], resumed: str) -> list[str]:
    """The arguments that continue a run in its folder, which has its config."""
    value = OverridesParser.create().parse_override(resumed).value()
    folder = Path(str(value))
    others = [argument for argument in arguments if not argument.startswith(("resume=", "hydra.", ELSEWHERE))]
    if {"-m", "--multirun"} & set(others):
        raise UserError("resume=… continues one run; leave out -m")
    if others:
        raise UserError(f"resume=… continues with the run's own config; leave out {' '.join(others)}")
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"resume={value}: not the folder of a run ({CONFIG_FILE} is not there)")
    check_files(folder)
    if is_finished(folder):
        print(f"{value} is finished: its scores are in metrics.json")
        sys.exit()
    if any(argument.startswith("hydra.run.dir=") for argument in arguments):  # DDP's other processes have it
        return arguments
    run_dir = resumed.replace("resume=", "hydra.run.dir=", 1)
    return [*arguments, run_dir, "hydra.output_subdir=null"]


def check_files(folder: Path) -> None:
    """Raises UserError where a run that goes on would write elsewhere, or wait for a pipe."""
    for part in folder.rglob("*"):
        if "wandb" in part.relative_to(folder).parts[:-1]:  # its links lead to its cache
            continue
        linked = part.is_file() and part.stat().st_nlink > 1  # what is written here would be written there
        if linked or not (part.is_file() or part.is_dir()) or not part.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{part}: a run folder has files of its own alone, and no links to others; take it away")


def is_finished(folder: Path) -> bool:
    """Whether a run has its scores. Raises UserError where they are damaged."""
    file = folder / "metrics.json"
    if not os.path.lexists(file):
        return False
    try:
        read_metrics(file)
    except UserError as error:
        raise UserError(f"{error}; delete it, and the run can be finished again") from error
    return True


def read_text(file: Path) -> str:
    """Raises UserError for what is no text, or no file of a run's size."""
    try:
        if not file.is_file() or file.stat().st_size > MAX_BYTES:
            raise UserError(f"{file} cannot be read: it is no file of a run")
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def read_metrics(file: Path) -> dict[str, Any]:
    """A metrics.json. Raises UserError for anything else."""
    try:
        results = json.loads(read_text(file))
        for part in "metrics", "seconds":
            numbers = results[part]
            if not all(type(number) in (int, float) for number in numbers.values()):
                raise ValueError(f"{part} are not numbers")
            results[part] = {name: float(number) for name, number in numbers.items()}
        return results
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"{file} is damaged: {type(error).__name__} {error}") from error


def read_yaml(file: Path) -> Any:
    """Plain values. Raises UserError, also for a file that refers to its own parts: it could grow without end."""
    content = read_text(file)
    try:
        if "*" in content and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(content, Loader=LOADER)):
            raise UserError(f"{file} cannot be read: it refers to its own parts")
        if MAX_DIGITS.search(content):
            raise UserError(f"{file} cannot be read: it has a number without end")
        return yaml.load(content, Loader=LOADER)
    except (ValueError, TypeError, OverflowError, RecursionError, YAMLError) as error:  # TypeError: a list as a key
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from error


def get_nested(node: Any, *keys: str) -> Any:
    """What plain values have there; None where they have nothing."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def get_choices(hydra: Any) -> dict[str, Any]:
    """The chosen option of each group, of what a hydra.yaml holds."""
    found = get_nested(hydra, "hydra", "runtime", "choices")
    return found if isinstance(found, dict) else {}


def read_strings(file: Path, *keys: str) -> list[str]:
    """The list of texts in a file of Hydra's, below some keys. Raises UserError for anything else."""
    found = get_nested(read_yaml(file), *keys)
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        raise UserError(f"{file} is damaged: {'.'.join(keys)} is no list of texts")
    return found


def read_plain_config(file: Path) -> dict[str, Any]:
    """A run's config as it was written. Raises UserError, also where it would have anything looked up elsewhere."""
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise UserError(f"{file} is damaged: it is not the config of a run")
    for key, value in iterate_items(plain):
        for text in (key, value):
            if isinstance(text, str) and "\0" in text:
                raise UserError(f"{file} is damaged: {key} holds a null byte")
            if isinstance(text, str) and "${" in text and not OWN_REFERENCE.fullmatch(text):
                raise UserError(f"{file}: {key}={value}: the config of a run looks nothing up elsewhere")
    return plain


def read_config(file: Path) -> DictConfig:
    """The same as an object."""
    try:
        config = OmegaConf.create(read_plain_config(file))
    except OmegaConfBaseException as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())}") from error
    assert isinstance(config, DictConfig)
    return config


def make_portable(config: DictConfig) -> dict[str, Any]:
    """A resolved config as plain values that do not say in which folder its run lies."""
    folder = str(config.output_dir)

    def moved(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: moved(value) for key, value in node.items()}
        if isinstance(node, list):
            return [moved(value) for value in node]
        inside = isinstance(node, str) and (node == folder or node.startswith(folder + os.sep))
        return "${output_dir}" + node[len(folder) :] if inside else node

    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    return moved({**plain, "resume": None}) | {"output_dir": OUTPUT_DIR}


def write_config(config: DictConfig, folder: Path) -> None:
    """Puts a resolved config in the place of Hydra's, which says how it is composed."""
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(make_portable(config), sort_keys=False).encode())


def compute_digest(plain: dict[str, Any]) -> str:
    """Tells two runs' portable configs apart, wherever their folders lie and whatever they are trained on."""
    trainer = plain.get("trainer")
    if isinstance(trainer, dict):
        plain = plain | {"trainer": {key: value for key, value in trainer.items() if key != "accelerator"}}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def check_digest(plain: dict[str, Any], run: Any, file: Path) -> None:
    """Raises UserError where `file`, which says that it is of the run of digest `run`, is not of this config's.

    Nothing is known where it says nothing, and of a finished job of a sweep that goes on: Hydra writes its config anew.
    """
    if run is None:
        return
    values = [value for key, value in iterate_items(plain) if key != "output_dir" and isinstance(value, str)]
    if any("${" in value.replace("${output_dir}", "") for value in values):
        return
    try:
        same = compute_digest(plain | {"output_dir": OUTPUT_DIR, "resume": None}) == run
    except TypeError:  # keys or values that JSON has not
        same = False
    if not same:
        raise UserError(f"{file} and the config beside it are of two runs, or one of them is damaged")


def load_resumed_config(config: DictConfig) -> DictConfig:
    """The config of the run that is resumed, in the place of the one composed for its command.

    Raises UserError where it would have files written outside the run's folder, or anything sent.
    """
    file = Path(config.resume, CONFIG_FILE)
    own = read_config(file)
    for key in map(str, config.keys() - {"resume"}):
        if key not in own or not (OmegaConf.is_dict(config[key]) <= OmegaConf.is_dict(own[key]) or own[key] is None):
            raise UserError(f"{file} is damaged: {key} is missing or has another form")
    own.resume, own.output_dir = config.resume, config.output_dir
    if any(override.startswith(ELSEWHERE) for override in HydraConfig.get().overrides.task):
        own.trainer.accelerator = config.trainer.accelerator
    folder = Path(config.output_dir).resolve()
    for key, value in iterate_items(OmegaConf.to_container(own, resolve=True)):
        if not isinstance(value, str):
            continue
        place, last = Path(re.sub("^(sqlite:///|file:(//)?)", "", value)), key.rpartition(".")[2]
        leads = place.is_absolute() or {"..", "~"} & set(place.parts)
        writer = key.startswith(WRITERS)
        written = last in WRITTEN or (leads and writer)
        outside = written and not place.resolve().is_relative_to(folder)
        if outside or (writer and ("._args_." in key or EXPANDED.match(value))):
            raise UserError(f"{file}: {key}={value}: a run that is continued writes into its own folder alone")
        if leads and key.startswith("data.") and last in ("root", "folder") and not place.expanduser().exists():
            raise UserError(f"{file}: {key}={value}: there is no such folder; a run that is continued makes none there")
        if last in ("api_key", "model_registry") or "://" in re.sub("^(sqlite|file)://", "", value):
            raise UserError(f"{file}: {key}={value}: a run that is continued sends nothing to an address of its config")
    return own


def print_continue_command(folder: Path, signal: str) -> None:
    if (folder / CONFIG_FILE).is_file():
        command = f"python -m src.train resume={shlex.quote(os.path.relpath(folder))}"
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            command = format_continue_command(Path(HydraConfig.get().sweep.dir, "multirun.yaml"))
        print(f"\nstopped by {signal}; continue with: {command}", file=sys.stderr)
    else:
        print(f"\nstopped by {signal}", file=sys.stderr)


def format_continue_command(multirun: Path) -> str:
    """The command that the sweep was started with, and the switch that makes it continue."""
    task, hydra = (read_strings(multirun, "hydra", "overrides", part) for part in ("task", "hydra"))
    own = ("hydra.mode=", "hydra.sweep.dir=", "hydra.job.config.override_dirname.exclude_keys=")
    flag = ["-m"] if "hydra.mode=MULTIRUN" in hydra else []
    further = [*(one for one in hydra if not one.startswith(own)), f"hydra.sweep.dir={multirun.parent}"]
    return shlex.join(["python", "-m", "src.train", *flag, *task, *further])
