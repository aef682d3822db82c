"""The files of a run folder, and what is needed to continue the run."""

import json
import os
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from src.core.compat import apply_overrides
from src.core.config import OUTPUT_DIR, iterate_items
from src.core.error_messages import describe_error
from src.core.errors import DivergenceError, UserError
from src.core.files import write_atomically
from src.core.process import is_first_process

CONFIG_FILE, METRICS_FILE, STATUS_FILE = ".hydra/config.yaml", "metrics.json", "status.json"
MARKS = {"run": CONFIG_FILE, "sweep": "multirun.yaml", "study": ".tune"}  # what the folder of each begins with
EARLY_FILES = (  # what a run or study writes before the first batch
    *(".hydra", ".tune", ".lock", STATUS_FILE, "train.log", "tune.log", "layers.txt", "hparams.yaml", "metrics.csv"),
    *("events.out.tfevents.*", "study.db", ".study.lock", "checkpoints"),
)
# An interpolation other than of the config's own keys and by the two resolvers that conf/ uses.
FOREIGN_REFERENCE = re.compile(r"\$\{(?!([\w.]+|hydra:runtime\.output_dir|oc\.env:MNIST_ROOT,data)\})")
# What may change when a run is resumed; callbacks.resume and its dirpath tell where the checkpoints are.
RESUME_OVERRIDES = re.compile(
    r"[+~]*(trainer\.(max_epochs|max_steps|max_time|accelerator|devices|strategy)|data\.(root|num_workers)|threads|test"
    r"|logger|callbacks(?!\.resume(=|\.dirpath)))([.=].*)?"
)
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is available


def is_finished(folder: Path) -> bool:
    """Return whether a run has its final metrics. Raise UserError if the file is damaged."""
    return (folder / METRICS_FILE).exists() and bool(read_metrics(folder / METRICS_FILE))


def reject_other_kind(key: str, folder: Path, kind: str) -> None:
    """Raise UserError if the folder for a `kind` of program, which `key` names, is that of another."""
    for other, mark in MARKS.items():
        if other != kind and (folder / mark).exists():
            raise UserError(f"{key}={folder}: holds a {other}; type another folder")


def holds_run(folder: Path) -> bool:
    """Return whether a run has begun in a folder; Hydra's files alone, which may be cut short, can be written anew."""
    return any(any(folder.glob(name)) for name in (METRICS_FILE, STATUS_FILE, "scores.json", "checkpoints/*"))


def read_metrics(file: Path) -> dict[str, Any]:
    """Read a metrics.json. Raise UserError if it is not one."""
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        for part in "metrics", "seconds":
            results[part] = {name: float(number) for name, number in results[part].items()}
        return results
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"damaged ({type(error).__name__} {error})"
        raise UserError(f"{file}: {reason}; delete it to finish the run again") from error


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
    """Read the saved config of a run. Raise UserError if it is none, or interpolates anything but its own keys."""
    plain = read_yaml(file)
    if not isinstance(plain, dict):
        raise UserError(f"{file}: not the config of a run; fix or remove it")
    for key, value in iterate_items(plain):
        if isinstance(value, str) and FOREIGN_REFERENCE.search(value):
            raise UserError(f"{file}: {key}={value}: a saved config may only refer to its own keys; write the value")
    return plain


def make_portable(config: DictConfig) -> dict[str, Any]:
    """Return the values of a resolved config, in which the run folder is `${output_dir}` wherever it lies."""
    output_dir = str(config.output_dir)

    def replace(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replace(value) for key, value in node.items()}
        if isinstance(node, list):
            return [replace(value) for value in node]
        is_inside = isinstance(node, str) and (node == output_dir or node.startswith(output_dir + os.sep))
        return "${output_dir}" + node[len(output_dir) :] if is_inside else node

    return replace({**OmegaConf.to_container(config), "resume": None}) | {"output_dir": OUTPUT_DIR}  # type: ignore[dict-item]


def write_config(config: DictConfig, folder: Path, overrides: Sequence[str] | None = None) -> None:
    """Replace the config that Hydra wrote by the resolved one, and its overrides if the run was resumed with others."""
    plain = make_portable(config)
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())
    if overrides is not None:
        write_atomically(folder / ".hydra/overrides.yaml", yaml.safe_dump(list(overrides), allow_unicode=True).encode())


def load_resumed_config(config: DictConfig, changes: Sequence[str]) -> DictConfig:
    """Load the saved config of the run that `config.resume` names, and apply the overrides `changes` to it.

    Keys that it lacks are taken from `config`, today's defaults, with a warning.
    """
    file = Path(config.resume, CONFIG_FILE)
    plain, before = read_plain_config(file), read_strings(file.with_name("overrides.yaml"))
    if missing := [str(key) for key in config if key not in plain and f"~{key!s}" not in before]:
        print(f"warning: {file} lacks {', '.join(missing)}; today's defaults are used", file=sys.stderr)
    groups = {change: change.partition("=")[0] for change in changes if re.match("(callbacks|logger)=", change)}
    replaced = {key: config[key] for key in ("resume", "output_dir", *missing, *groups.values())}
    saved = OmegaConf.create({**plain, **replaced})
    apply_overrides([change for change in changes if change not in groups], saved)
    return saved


def merge_overrides(before: Sequence[str], changes: Sequence[str]) -> list[str]:
    """Return the overrides of a changed run: a change takes the place of an earlier one of its key, or follows it."""
    changed = {change.partition("=")[0] for change in changes}
    return [*(item for item in before if item.partition("=")[0] not in changed), *changes]


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
    status = "finished", "", ""
    try:
        yield
    except SystemExit:
        status = "interrupted", "", ""
        raise
    except Exception as error:
        stops_early = type(error).__name__ == "TrialPruned"  # by name: not every installation has Optuna
        line = str(error) if stops_early else describe_error(error)
        is_pruned = stops_early or (is_trial and isinstance(error, DivergenceError))
        message = line or " ".join(f"{type(error).__name__}: {error}".split())
        trace = "" if line else "".join(traceback.format_exception(error))
        status = "pruned" if is_pruned else "failed", message, trace
        raise
    finally:
        has_finished = (folder / METRICS_FILE).exists()  # perhaps earlier, if it failed when it was to train longer
        with suppress(OSError):  # a full disk must not hide the error
            write_status(folder, *(("finished",) if has_finished else status))


def remove_if_untrained(folder: Path) -> None:
    """Remove what a run or study without a checkpoint or metrics has written, and its folder if then empty."""
    for run in (*folder.glob("[0-9][0-9][0-9]_*"), folder):  # trials first
        if any(run.glob("checkpoints/*.ckpt")) or (run / METRICS_FILE).exists():
            return
        for path in [path for pattern in EARLY_FILES for path in run.glob(pattern)]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with suppress(OSError):  # others' files are in it
            run.rmdir()


def print_continue_command(code: Any, command: str) -> None:
    """Print the command that continues what SIGINT or SIGTERM has stopped, which is to exit with `code`."""
    if code in (130, 143):
        print(f"\nstopped by {signal.Signals(code - 128).name}; continue with: {command}", file=sys.stderr)
