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
from src.core.errors import UserError
from src.core.files import write_atomically
from src.core.process import is_first_process

CONFIG_FILE, METRICS_FILE, STATUS_FILE = ".hydra/config.yaml", "metrics.json", "status.json"
# Files by which a folder is known as one of these; Hydra's alone, which may be cut short, are no run.
KINDS = {"multirun.yaml": "sweep", ".tune": "study", STATUS_FILE: "run", METRICS_FILE: "run", "checkpoints": "run"}
EARLY_FILES = re.compile(  # what a run or study writes before the first batch
    r"(config|hydra|overrides)\.yaml|(train|tune)\.log|layers\.txt|hparams\.yaml|metrics\.csv|status\.json|study\.db"
    r"|events\.out\.tfevents\..*|\.(study\.)?lock|init_from\.json|\.hydra|\.tune|checkpoints|\d{3}_.*"
)
# An interpolation other than of the config's own keys and by the two resolvers that conf/ uses.
FOREIGN_REFERENCE = re.compile(r"\$\{(?!([\w.]+|hydra:runtime\.output_dir|oc\.env:MNIST_ROOT,data)\})[^}]*\}?")
# What may change when a run is resumed; callbacks.resume and its dirpath tell where the checkpoints are.
RESUME_OVERRIDES = re.compile(
    r"[+~]*(trainer\.(max_epochs|max_steps|max_time|accelerator|devices|strategy)|data\.(root|num_workers)|threads|test"
    r"|logger|callbacks(?!\.resume(=|\.dirpath)))([.=].*)?"
)
YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is available


def find_kind(folder: Path) -> str | None:
    """Return whether a folder holds a sweep, a study or a run; None for another folder."""
    return next((kind for name, kind in KINDS.items() if (folder / name).exists()), None)


def read_file(file: Path, kind: type = dict) -> Any:
    """Read a JSON or YAML file of plain values. Raise UserError if it is damaged or holds another kind of value."""
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=YAML_LOADER)
        if not isinstance(content, kind):
            raise TypeError(f"not a {kind.__name__}")
        return content
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:  # TypeError: a list as a key
        raise UserError(f"{file}: damaged ({' '.join(str(error).split())}); fix or remove it") from error


def read_config(folder: Path) -> dict[str, Any]:
    """Read the saved config of a run. Raise UserError if it interpolates anything but its own keys."""
    plain = read_file(folder / CONFIG_FILE)
    if match := FOREIGN_REFERENCE.search(str(plain)):
        raise UserError(f"{folder / CONFIG_FILE}: {match[0]}: a saved config may only refer to its own keys")
    return plain


def make_portable(config: DictConfig) -> dict[str, Any]:
    """Return the values of a resolved config, in which the run folder is `${output_dir}` wherever it lies."""
    folder, portable = str(config.output_dir), config.copy()
    for key, value in iterate_items(OmegaConf.to_container(config)):
        if isinstance(value, str) and f"{value}{os.sep}".startswith(folder + os.sep):
            OmegaConf.update(portable, key, value.replace(folder, "${output_dir}", 1))
    portable.update(resume=None, output_dir=OUTPUT_DIR)
    return OmegaConf.to_container(portable)  # type: ignore[return-value]


def write_config(config: DictConfig, folder: Path, changes: Sequence[str] | None = None) -> None:
    """Replace the config that Hydra wrote by the resolved one, and change the overrides if the run was resumed."""
    plain = make_portable(config)
    write_atomically(folder / CONFIG_FILE, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True).encode())
    if changes is not None:
        file = folder / ".hydra/overrides.yaml"
        before, changed = read_file(file, list) if file.exists() else [], [x.partition("=")[0] for x in changes]
        overrides = [*(item for item in before if item.partition("=")[0] not in changed), *changes]
        write_atomically(file, yaml.safe_dump(overrides, allow_unicode=True).encode())


def load_resumed_config(config: DictConfig, changes: Sequence[str]) -> DictConfig:
    """Load the saved config of the run that `config.resume` names, and apply the overrides `changes` to it.

    Keys that it lacks are taken from `config`, today's defaults, with a warning.
    """
    file = Path(config.resume, CONFIG_FILE)
    plain, before = read_config(Path(config.resume)), read_file(file.with_name("overrides.yaml"), list)
    if missing := [str(key) for key in config if key not in plain and f"~{key!s}" not in before]:
        print(f"warning: {file} lacks {', '.join(missing)}; today's defaults are used", file=sys.stderr)
    groups = {change: change.partition("=")[0] for change in changes if re.match("(callbacks|logger)=", change)}
    replaced = {key: config[key] for key in ("resume", "output_dir", *missing, *groups.values())}
    saved = OmegaConf.create({**plain, **replaced})
    apply_overrides([change for change in changes if change not in groups], saved)
    return saved


def read_status(folder: Path) -> dict[str, str]:
    """Read a run's status.json: state, message and traceback; empty if there is none."""
    return read_file(folder / STATUS_FILE) if (folder / STATUS_FILE).exists() else {}


def write_status(folder: Path, state: str, message: str = "", trace: str = "") -> None:
    """Write status.json. `state` is running, finished, failed, pruned or interrupted."""
    content = {"state": state, "message": message, "traceback": trace}
    write_atomically(folder / STATUS_FILE, json.dumps(content, indent=1).encode())


@contextmanager
def record_status(folder: Path) -> Iterator[None]:
    """Write status.json when a run begins and when it ends; any exception goes on.

    A user's mistake is recorded as one line, a bug with its traceback.
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
        is_pruned = type(error).__name__ == "TrialPruned"  # by name: not every installation has Optuna
        line = str(error) if is_pruned else describe_error(error)
        message = line or " ".join(f"{type(error).__name__}: {error}".split())
        trace = "" if line else "".join(traceback.format_exception(error))
        status = "pruned" if is_pruned else "failed", message, trace
        raise
    finally:
        with suppress(OSError):  # a full disk must not hide the error
            write_status(folder, *status)


def remove_if_untrained(folder: Path) -> None:
    """Remove the folder of a run or study that has nothing but what precedes the first batch."""
    if all(EARLY_FILES.fullmatch(path.name) for path in folder.rglob("*")):
        shutil.rmtree(folder)


def print_continue_command(code: Any, command: str) -> None:
    """Print the command that continues what SIGINT or SIGTERM has stopped, which is to exit with `code`."""
    if code in (130, 143):
        print(f"\nstopped by {signal.Signals(code - 128).name}; continue with: {command}", file=sys.stderr)
