"""The files of a run folder, and what is needed to continue the run or its sweep."""

import json
import os
import re
import shlex
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.core.config import iterate_items
from src.core.error_messages import describe_error
from src.core.errors import DivergenceError, UserError
from src.core.files import write_atomically
from src.core.process import is_first_process

CONFIG_FILE, METRICS_FILE, STATUS_FILE = ".hydra/config.yaml", "metrics.json", "status.json"
STOP_FILE = ".stop"  # in the folder of a sweep that fails fast: no further job starts
OUTPUT_DIR = "${hydra:runtime.output_dir}"
# The interpolations that a saved config may hold: its own keys, and what conf/ itself looks up.
OWN_REFERENCE = re.compile(r"(\$\{[\w.]+\}|\$\{hydra:runtime\.output_dir\}|\$\{oc\.env:MNIST_ROOT,data\}|[^$])*")
RESUME_OVERRIDES = ("trainer.accelerator",)  # may differ when a run is resumed
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is available


def is_finished(folder: Path) -> bool:
    """Return whether a run has its final metrics. Raise UserError if the file is damaged."""
    return (folder / METRICS_FILE).exists() and bool(read_metrics(folder / METRICS_FILE))


def holds_run(folder: Path) -> bool:
    """Return whether a folder holds a config, checkpoints or metrics that a new run would overwrite.

    A config that was cut short while it was written does not count where nothing was trained.
    """
    if any((folder / name).exists() for name in (METRICS_FILE, "multirun.yaml", "study.db")):
        return True
    try:
        return any(folder.glob("checkpoints/*")) or bool(read_plain_config(folder / CONFIG_FILE))
    except UserError:
        return False


def read_metrics(file: Path) -> dict[str, Any]:
    """Read a metrics.json. Raise UserError if it is not one."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        for part in "metrics", "seconds":
            results[part] = {name: float(number) for name, number in results[part].items()}
        return results
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file}: damaged ({type(error).__name__} {error}); delete it to finish the run again"
        ) from error


def read_yaml(file: Path) -> Any:
    """Read a YAML file of plain values. Raise UserError if it cannot be read."""
    try:
        return yaml.load(file.read_text(encoding="utf-8"), Loader=YAML_LOADER)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: a list as a key
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())}); fix or remove it") from error


def read_strings(file: Path, *keys: str) -> list[str]:
    """Read the list of strings below nested keys of a YAML file of Hydra's. Raise UserError for anything else."""
    value = read_yaml(file)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise UserError(f"{file}: damaged, {'.'.join(keys)} must be a list of strings; fix or remove it")
    return value


def read_plain_config(file: Path) -> dict[str, Any]:
    """Read the saved config of a run. Raise UserError if it interpolates anything but its own keys."""
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise UserError(f"{file}: not the config of a run; fix or remove it")
    for key, value in iterate_items(plain):
        if isinstance(value, str) and not OWN_REFERENCE.fullmatch(value):
            raise UserError(f"{file}: {key}={value}: a saved config may only refer to its own keys; write the value")
    return plain


def write_config(config: DictConfig, folder: Path) -> None:
    """Replace the config that Hydra wrote by the resolved one, in which the run folder is `${output_dir}`."""
    output_dir = str(config.output_dir)

    def make_portable(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: make_portable(value) for key, value in node.items()}
        if isinstance(node, list):
            return [make_portable(value) for value in node]
        is_inside = isinstance(node, str) and (node == output_dir or node.startswith(output_dir + os.sep))
        return "${output_dir}" + node[len(output_dir) :] if is_inside else node

    plain = make_portable({**OmegaConf.to_container(config), "resume": None}) | {"output_dir": OUTPUT_DIR}  # type: ignore[dict-item]
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())


def load_resumed_config(config: DictConfig) -> DictConfig:
    """Load the saved config of the run that `config.resume` names.

    Overrides in RESUME_OVERRIDES are taken from `config`; so are keys that the saved config lacks, with a warning.
    """
    file = Path(config.resume, CONFIG_FILE)
    saved = OmegaConf.create(read_plain_config(file))
    if missing := [str(key) for key in config if key not in saved]:
        print(f"warning: {file} lacks {', '.join(missing)}; today's defaults are used", file=sys.stderr)
        saved.update({key: config[key] for key in missing})
    saved.resume, saved.output_dir = config.resume, config.output_dir
    for override in HydraConfig.get().overrides.task:
        if (key := override.partition("=")[0]) in RESUME_OVERRIDES:
            OmegaConf.update(saved, key, OmegaConf.select(config, key))
    return saved


def read_status(folder: Path) -> dict[str, str] | None:
    """Read a run's status.json: state, message and traceback; None if there is none."""
    try:
        return json.loads((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_status(folder: Path, state: str, message: str = "", trace: str = "") -> None:
    """Write status.json. `state` is running, finished, failed, pruned, interrupted or lost."""
    content = {"state": state, "message": message, "traceback": trace}
    write_atomically(folder / STATUS_FILE, json.dumps(content, indent=1).encode())


@contextmanager
def record_status(folder: Path, is_trial: bool = False) -> Iterator[None]:
    """Write status.json when a run begins and when it ends; any exception goes on.

    A user's mistake is recorded as one line, a bug with its traceback. In a study (`is_trial`) a diverged run counts
    as pruned.
    """
    if not is_first_process():
        yield
        return
    write_status(folder, "running")
    try:
        yield
        write_status(folder, "finished")
    except SystemExit:
        write_status(folder, "interrupted")
        raise
    except Exception as error:
        stops_early = type(error).__name__ == "TrialPruned"  # by name: not every installation has Optuna
        line = "worse than earlier trials at this epoch" if stops_early else describe_error(error)
        is_pruned = stops_early or (is_trial and isinstance(error, DivergenceError))
        trace = "" if line else "".join(traceback.format_exception(error))
        message = line or " ".join(f"{type(error).__name__}: {error}".split())
        with suppress(OSError):  # a full disk must not hide the error
            write_status(folder, "pruned" if is_pruned else "failed", message, trace)
        raise


def remove_if_untrained(folder: Path) -> None:
    """Remove the folder of a run or study without a checkpoint or metrics, and its parent in outputs/ if then empty."""
    if not any(folder.rglob("checkpoints/*.ckpt")) and not any(folder.rglob(METRICS_FILE)):
        shutil.rmtree(folder, ignore_errors=True)
        if folder.resolve().parent.parent == Path("outputs").resolve() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def print_continue_command(folder: Path, signal_name: str) -> None:
    """Print the command that continues an interrupted run or sweep."""
    command = f"python -m src.train resume={shlex.quote(os.path.relpath(folder))}"
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        command = format_continue_command(Path(HydraConfig.get().sweep.dir, "multirun.yaml"))
    print(f"\nstopped by {signal_name}; continue with: {command}", file=sys.stderr)


def format_continue_command(multirun: Path) -> str:
    """Return the command that started the sweep of a multirun.yaml, with the folder that makes it continue."""
    task, hydra = (read_strings(multirun, "hydra", "overrides", part) for part in ("task", "hydra"))
    generated = ("hydra.mode=", "hydra.sweep.dir=", "hydra.job.config.override_dirname.exclude_keys=")
    flag = ["-m"] if "hydra.mode=MULTIRUN" in hydra else []
    overrides = [*(item for item in hydra if not item.startswith(generated)), f"hydra.sweep.dir={multirun.parent}"]
    return shlex.join(["python", "-m", "src.train", *flag, *task, *overrides])


def reject_different_config(before: Any, config: Any, name: str) -> None:
    """Raise UserError for the first key in which a continued sweep or study differs from what it was begun with."""
    before, now = (
        {key: value for key, value in _flatten(node).items() if not key.startswith("hydra.")}
        for node in (before, config)
    )
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(
                f"{key}={now.get(key)}: {name} was begun with {before.get(key)}; type that, or choose another folder"
            )


def _flatten(config: Any) -> dict[str, Any]:
    """Return the leaves of a config by dotted key, interpolations as they are written."""
    plain = OmegaConf.to_container(config) if OmegaConf.is_config(config) else config
    return {key: value for key, value in iterate_items(plain) if not isinstance(value, dict | list)}
