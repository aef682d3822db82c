"""Continue a sweep or a study: its command, and the refusal of a config that differs."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from src.core.config import iterate_items
from src.core.errors import UserError
from src.core.run_folder import read_strings


def format_continue_command(multirun: Path) -> str:
    """Return the command that started the sweep of a multirun.yaml, with the folder that makes it continue."""
    task, hydra = (read_strings(multirun, "hydra", "overrides", part) for part in ("task", "hydra"))
    generated = ("hydra.mode=", "hydra.sweep.dir=", "hydra.job.config.override_dirname.exclude_keys=")
    flag = ["-m"] if "hydra.mode=MULTIRUN" in hydra else []
    overrides = [*(item for item in hydra if not item.startswith(generated)), f"hydra.sweep.dir={multirun.parent}"]
    return shlex.join(["python", "-m", "src.train", *flag, *task, *overrides])


def reject_different_config(before: Any, config: Any, name: str, overrides: Sequence[str]) -> None:
    """Raise UserError for the first key in which a continued sweep or study differs from what it was begun with.

    A key that it lacks was added to conf/ later, unless the overrides add it.
    """
    old, new = (
        {key: x for key, x in iterate_items(plain) if not isinstance(x, dict | list) and not key.startswith("hydra.")}
        for plain in (before, config)
    )
    added = tuple(item.lstrip("+").partition("=")[0] for item in overrides if item.startswith("+"))
    keys = sorted(old.keys() | {key for key in new if key.startswith(added)})
    if key := next((key for key in keys if old.get(key) != new.get(key)), None):
        fix = f"{name} was begun with {old.get(key)}; type that, or choose another folder"
        raise UserError(f"{key}={new.get(key)}: {fix}")
