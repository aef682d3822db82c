"""Read the runs below some folders, group them by settings and average over seeds."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from src.core import run_folder
from src.core.config import iterate_items
from src.core.errors import UserError
from src.sweeps.grid import list_jobs

FINISHED, FAILED, PRUNED, LOST, UNFINISHED = "finished", "failed", "pruned", "lost", "unfinished"
NOT_STARTED, UNREADABLE = "not started", "unreadable"
STATES = FINISHED, FAILED, PRUNED, LOST, UNFINISHED, NOT_STARTED
# Where and how a run was started. Seeds are averaged over.
IGNORED = {
    *("seed", "data.seed", "threads", "name", "output_dir", "resume", "sweep", "trainer.accelerator"),
    *("trainer.devices", "trainer.devices.0"),
}


@dataclass
class Run:
    """One run: its state, the overrides it was started with, its config and the content of metrics.json."""

    folder: Path
    state: str
    overrides: list[str]
    settings: dict[str, str] = field(default_factory=dict)  # every leaf of the config, and overridden groups
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def seed(self) -> Any:
        return self.results.get("seed", self.settings.get("seed"))

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value for name, value in self.results.get("metrics", {}).items() if not name.endswith("_step")}

    @property
    def seconds(self) -> float:
        return sum(self.results.get("seconds", {}).values())


def format_train_command(runs: Sequence[Run]) -> str:
    """Return the command that trains these runs again: one run, or a multirun over their seeds."""
    overrides = [item for item in runs[0].overrides if not item.startswith(("sweep=", "seed="))]
    has_seed = any(item.startswith("seed=") for item in runs[0].overrides) or len(runs) > 1
    seeds = [f"seed={','.join(str(run.seed) for run in runs)}"] * has_seed
    return shlex.join(["python", "-m", "src.train", *["-m"] * (len(runs) > 1), *overrides, *seeds])


def parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Return the values of overrides by key, each as `format_setting` writes it."""
    return dict(map(_parse_override, overrides))


@cache  # ten thousand jobs have few different overrides
def _parse_override(override: str) -> tuple[str, str]:
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, format_setting(parsed.value())


def format_setting(value: Any) -> str:
    """Format a config value so that equal values are equal strings: 0, 0.0 and 0e0 are one setting."""
    if value is None:
        return "null"
    return f"{value:.6g}" if type(value) in (int, float) else str(value).replace(" ", "")


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run below the folders, and list the jobs of their sweeps that have not started.

    Raises UserError if there is none.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run or a sweep below outputs/")
        for hydra_folder in sorted(folder.rglob(".hydra")):
            runs.setdefault(hydra_folder.parent.resolve(), read_run(hydra_folder.parent))
        for file in sorted(folder.rglob("multirun.yaml")):
            started = {frozenset(parse_overrides(run.overrides).items()) for run in runs.values()}
            for overrides in _list_planned_jobs(file):
                parsed = parse_overrides(overrides)
                if frozenset(parsed.items()) not in started:
                    path = file.parent / " ".join(overrides)
                    runs[path] = Run(path, NOT_STARTED, overrides, parsed)
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no runs in here; name the folder of a sweep")
    return list(runs.values())


def read_run(folder: Path) -> Run:
    """Read the run in a folder. One that cannot be read has the state `unreadable` and says why in `error`."""
    status = run_folder.read_status(folder) or {"state": "running", "message": ""}
    state = status["state"] if status["state"] in STATES else UNFINISHED
    run = Run(folder, FINISHED if (folder / run_folder.METRICS_FILE).exists() else state, [], error=status["message"])
    try:
        if run.state == FINISHED:
            run.results = run_folder.read_metrics(folder / run_folder.METRICS_FILE)
        run.overrides = run_folder.read_strings(folder / ".hydra/overrides.yaml")
        run.settings = parse_overrides(run.overrides)
        config = run_folder.read_plain_config(folder / run_folder.CONFIG_FILE)
        leaves = {key: value for key, value in iterate_items(config) if not isinstance(value, dict)}
        if any("${" in str(value).replace("${output_dir}", "") for key, value in leaves.items() if key != "output_dir"):
            return run  # it failed before its config was resolved
        run.config = config
        run.settings = run.results.get("choices", {}) | run.settings
        run.settings |= {key: format_setting(value) for key, value in leaves.items()}
    except (UserError, HydraException) as error:
        if run.state == UNFINISHED:  # Hydra was killed while it wrote these files
            return Run(folder, UNFINISHED, [])
        run.state, run.error = UNREADABLE, " ".join(str(error).split())
    return run


def _list_planned_jobs(multirun: Path) -> list[list[str]]:
    """Return the overrides of every job of a sweep, from the multirun.yaml that Hydra writes first."""
    try:
        hydra = run_folder.read_yaml(multirun)["hydra"]
        params = hydra["sweeper"].get("params") or {}
        overrides = [f"{key}={value}" for key, value in params.items()] + hydra["overrides"]["task"]
        return list_jobs(overrides, hydra["callbacks"]["sweep"].get("zip") or ())
    except (UserError, HydraException, TypeError, KeyError, AttributeError):
        return []  # Hydra was killed while it wrote the file


@dataclass
class Setting:
    """The runs whose settings are equal, seeds aside. `items` are the keys that differ between settings."""

    items: tuple[tuple[str, str], ...]
    runs: list[Run]

    @property
    def values(self) -> dict[str, str]:
        return dict(self.items)

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == FINISHED]

    @property
    def state(self) -> str:
        states = {run.state for run in self.runs}
        return next(state for state in STATES if state in states)

    @property
    def name(self) -> str:
        alone = self.runs[0].folder.name if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or alone

    def scores(self, metric: str) -> list[float]:
        """Return one score per distinct seed: the same run twice says nothing new."""
        by_seed = {run.seed: run.metrics[metric] for run in self.finished if metric in run.metrics}
        return list(by_seed.values())

    def mean(self, metric: str) -> float:
        return fmean(self.scores(metric) or [math.nan])

    def std(self, metric: str) -> float:
        """Return the sample standard deviation; NaN for fewer than two finite scores."""
        scores = self.scores(metric)
        return stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else math.nan


@dataclass
class Comparison:
    """Settings, best first; those without a score last. `metric` is what they are ranked by, if anything."""

    runs: list[Run]
    keys: list[str]  # what differs between settings
    settings: list[Setting]
    metric: str | None
    lower_is_better: bool
    reason_not_ranked: str
    unreadable: list[Run]

    @property
    def best(self) -> Setting | None:
        first = self.settings[0]
        return first if self.metric and math.isfinite(first.mean(self.metric)) else None


def compare_runs(found: list[Run]) -> Comparison:
    """Group runs by everything in their configs that differs, seeds aside, and rank the groups.

    Raises UserError if no run can be read.
    """
    runs, unreadable = ([run for run in found if (run.state == UNREADABLE) == wanted] for wanted in (False, True))
    if not runs:
        raise UserError(f"no run in here can be read: {unreadable[0].error}")
    named = list(dict.fromkeys(key for run in runs for key in parse_overrides(run.overrides)))
    every_key = dict.fromkeys([*named, *(key for run in runs for key in run.settings)])
    keys = [key for key in every_key if key not in IGNORED]
    complete = [run for run in runs if run.config]
    differing = [key for key in keys if len({run.settings.get(key) for run in complete}) > 1]
    groups: dict[Any, list[Run]] = {}
    for run in complete:  # data=auto is MNIST on one machine and digits on another
        values = *(run.settings.get(key) for key in differing), run.results.get("data")
        groups.setdefault(values, []).append(run)
    shown = [key for key in keys if key in named and len({run.settings.get(key) for run in runs}) > 1]
    for key in differing:  # an edited file changes settings that no override names
        if len({_get_values(group[0], shown) for group in groups.values()}) < len(groups) and key not in shown:
            shown.append(key)
    for run in runs:  # not started, or stopped before its config was written: its overrides tell where it belongs
        if not run.config:
            values = _get_values(run, shown)
            alike = [group for group in groups.values() if _get_values(group[0], shown) == values]
            (alike[0] if alike else groups.setdefault(values, [])).append(run)
    settings = [Setting(_get_values(group[0], shown), group) for group in groups.values()]
    metric, lower_is_better, reason = _find_metric(runs)

    def rank(setting: Setting) -> tuple[bool, float]:
        mean = setting.mean(metric) if metric else math.nan
        return not math.isfinite(mean), (mean if lower_is_better else -mean) if mean == mean else 0.0

    return Comparison(runs, shown, sorted(settings, key=rank), metric, lower_is_better, reason, unreadable)


def _get_values(run: Run, keys: list[str]) -> tuple[tuple[str, str], ...]:
    return tuple((key, run.settings.get(key, "")) for key in keys)


def _find_metric(runs: list[Run]) -> tuple[str | None, bool, str]:
    """Return the metric to rank by and whether lower is better, or None and the reason why there is none."""
    configs = [run.config for run in runs if run.state == FINISHED]
    if not configs:
        return None, False, "no run has finished"
    for key in "optimized_metric", "optimized_mode":
        if len({config.get(key) for config in configs}) > 1:
            return None, False, f"the runs differ in {key}"
    reason = next((reason for config in configs if (reason := explain_no_ranking(config))), "")
    if reason:
        return None, False, reason
    return configs[0]["optimized_metric"], configs[0].get("optimized_mode") == "min", ""


def explain_no_ranking(config: Any) -> str:
    """Return why no run may be chosen by the config's optimized_metric; an empty string if it may."""
    metric = config.get("optimized_metric")
    if metric is None:
        return "optimized_metric is null"
    if metric.startswith("test/"):
        return f"{metric} is a test score, which must not choose anything"
    if (config.get("data") or {}).get("test_every_epoch"):
        return "with data.test_every_epoch the validation images are the test images, which must not choose anything"
    return ""
