"""Read the runs below some folders, group them by settings and average over seeds."""

import math
import shlex
from collections.abc import Sequence
from contextlib import suppress
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
from src.sweeps.grid import list_jobs_of_sweep

FINISHED, FAILED, PRUNED, LOST, UNFINISHED = "finished", "failed", "pruned", "lost", "unfinished"
NOT_STARTED, UNREADABLE = "not started", "unreadable"
STATES = FINISHED, FAILED, PRUNED, LOST, UNFINISHED, NOT_STARTED
# Where and how a run was started. Seeds are averaged over.
IGNORED = {"seed", "data.seed", "threads", "name", "output_dir", "resume", "sweep"}
IGNORED |= {"trainer.accelerator", "trainer.devices", "trainer.devices.0"}


@dataclass
class Run:
    """One run. `settings` are its overrides and, once its config is resolved, every leaf of `config`."""

    folder: Path
    state: str
    overrides: list[str] = field(default_factory=list)
    settings: dict[str, str] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # the content of metrics.json
    metrics: dict[str, float] = field(default_factory=dict)  # those of the last epoch
    seconds: float = 0.0
    error: str = ""
    has_traceback: bool = False

    @property
    def seed(self) -> str:
        return self.settings.get("seed", "")

    @property
    def named(self) -> dict[str, str]:
        """The settings that an override of this run names, seeds aside."""
        return {key: value for key, value in map(_parse_override, self.overrides) if key not in IGNORED}


@dataclass
class Setting:
    """The runs that differ in nothing but IGNORED, and their values of the keys that differ elsewhere."""

    values: dict[str, str]
    runs: list[Run]

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == FINISHED]

    @property
    def state(self) -> str:
        return min((run.state for run in self.runs), key=STATES.index)

    @property
    def name(self) -> str:
        number = self.runs[0].folder.name if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or number

    def scores(self, metric: str | None) -> list[float]:
        """Return one score per seed: the same run twice is no further evidence."""
        return list({run.seed: run.metrics[metric] for run in self.finished if metric in run.metrics}.values())

    def mean(self, metric: str | None) -> float:
        return fmean(self.scores(metric) or [math.nan])

    def std(self, metric: str | None) -> float:
        """Return the sample standard deviation; NaN for fewer than two finite scores."""
        scores = self.scores(metric)
        return stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else math.nan


@dataclass
class Comparison:
    """Settings, best first; those without a score last. `metric` is what they are ranked by, if anything."""

    runs: list[Run]
    unreadable: list[Run]
    keys: list[str]  # what differs between settings
    settings: list[Setting]
    best: Setting | None
    metric: str | None
    lower_is_better: bool
    reason_not_ranked: str


def format_setting(value: Any) -> str:
    """Format a config value so that equal values are equal strings: 0, 0.0 and 0e0 are one setting."""
    if value is None:
        return "null"
    return f"{value:.6g}" if type(value) in (int, float) else str(value).replace(" ", "")


@cache  # ten thousand jobs have few different overrides
def _parse_override(override: str) -> tuple[str, str]:
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, format_setting(parsed.value())


def format_train_command(runs: Sequence[Run]) -> str:
    """Return the command that trains these runs again: one run, or a multirun over their seeds."""
    overrides = [item for item in runs[0].overrides if not item.startswith(("sweep=", "seed="))]
    seeds = ",".join(str(run.seed) for run in runs)
    return shlex.join(["python", "-m", "src.train", *["-m"] * (len(runs) > 1), *overrides, f"seed={seeds}"])


def read_run(folder: Path) -> Run:
    """Read the run in a folder. One that cannot be read has the state `unreadable` and says why in `error`."""
    status: dict[str, str] = run_folder.read_status(folder) or {}
    run = Run(folder, status.get("state", ""), error=status.get("message", ""))
    run.has_traceback = bool(status.get("traceback"))
    run.state = run.state if run.state in STATES else UNFINISHED
    try:
        if (folder / run_folder.METRICS_FILE).exists():
            run.state = FINISHED
            run.results = run_folder.read_metrics(folder / run_folder.METRICS_FILE)
            run.metrics = {name: x for name, x in run.results["metrics"].items() if not name.endswith("_step")}
            run.seconds = sum(run.results["seconds"].values())
        run.overrides = run_folder.read_strings(folder / ".hydra/overrides.yaml")
        run.settings = run.results.get("choices", {}) | dict(map(_parse_override, run.overrides))
        config = run_folder.read_plain_config(folder / run_folder.CONFIG_FILE)
        leaves = {key: value for key, value in iterate_items(config) if not isinstance(value, dict)}
        if not any("${" in str(leaves[key]).replace("${output_dir}", "") for key in leaves if key != "output_dir"):
            run.config = config  # it is resolved
            run.settings |= {key: format_setting(value) for key, value in leaves.items()}
            if "data" in run.results:  # data=auto may be one of two
                run.settings["data set"] = run.results["data"]
    except (UserError, HydraException) as error:
        if run.state != UNFINISHED:  # in an unfinished run Hydra was killed while it wrote these files
            run.state, run.error = UNREADABLE, " ".join(str(error).split())
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run below the folders, and list the jobs of their sweeps that have not started.

    Raises UserError if there is none.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run or a sweep below outputs/")
        for file in sorted(folder.rglob(".hydra")):
            runs.setdefault(file.parent.resolve(), read_run(file.parent))
    started = {frozenset(map(_parse_override, run.overrides)) for run in runs.values()}
    for file in (file for folder in folders for file in folder.rglob("multirun.yaml")):
        jobs: list[list[str]] = []
        with suppress(UserError, HydraException, TypeError, KeyError, AttributeError):  # cut short while it was written
            jobs = list_jobs_of_sweep(run_folder.read_yaml(file)["hydra"])
        for overrides in jobs:
            if (settings := frozenset(map(_parse_override, overrides))) not in started:
                path = file.parent / " ".join(overrides).replace("/", "-")
                runs[path] = Run(path, NOT_STARTED, overrides, dict(settings))
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no runs in here; name the folder of a sweep")
    return list(runs.values())


def compare_runs(found: Sequence[Run]) -> Comparison:
    """Group runs by everything in their configs that differs, seeds aside, and rank the groups.

    Raises UserError if no run can be read.
    """
    runs, unreadable = ([run for run in found if (run.state == UNREADABLE) == is_bad] for is_bad in (False, True))
    if not runs:
        raise UserError(f"no run in here can be read: {unreadable[0].error}")
    # A run that stopped early knows its overrides only; the rest is taken from a run with the same ones.
    known = {frozenset(run.named.items()): run.settings for run in sorted(runs, key=lambda run: len(run.settings))}
    named = dict.fromkeys(key for run in runs for key in run.named)
    for run in runs:
        run.settings = known[frozenset(run.named.items())] | run.settings
    keys = [key for key in named | dict.fromkeys(key for run in runs for key in run.settings) if key not in IGNORED]

    def count_values(key: str) -> int:
        return len({run.settings.get(key, "") for run in runs if run.results or key in run.settings})

    differing = [key for key in keys if count_values(key) > 1]
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(_get_values(run, differing), []).append(run)
    shown = [key for key in differing if key in named]
    for key in differing:  # an edited file changes keys that nobody named; they are shown if they alone differ
        if key not in named and len({_get_values(group[0], shown) for group in groups.values()}) < len(groups):
            shown.append(key)
    settings = [Setting({key: group[0].settings.get(key, "") for key in shown}, group) for group in groups.values()]
    finished = [run.config for run in runs if run.state == FINISHED]
    reason = explain_no_ranking(finished)
    metric = None if reason else finished[0]["optimized_metric"]
    lower_is_better = not reason and finished[0].get("optimized_mode") == "min"

    def rank(setting: Setting) -> float:
        mean = setting.mean(metric)
        return (mean if lower_is_better else -mean) if math.isfinite(mean) else math.inf

    settings.sort(key=rank)
    best = settings[0] if math.isfinite(settings[0].mean(metric)) else None
    return Comparison(runs, unreadable, shown, settings, best, metric, lower_is_better, reason)


def _get_values(run: Run, keys: Sequence[str]) -> tuple[str, ...]:
    return tuple(run.settings.get(key, "") for key in keys)


def explain_no_ranking(configs: Sequence[Any]) -> str:
    """Return why runs of these configs may not be ranked by optimized_metric; an empty string if they may."""
    metrics = {(config.get("optimized_metric"), config.get("optimized_mode")) for config in configs}
    if len(metrics) != 1:
        return "the runs differ in optimized_metric or optimized_mode" if metrics else "no run has finished"
    metric = str(metrics.pop()[0])
    if metric == "None":
        return "optimized_metric is null"
    if metric.startswith("test/") or any((config.get("data") or {}).get("test_every_epoch") for config in configs):
        return f"{metric} is a score on the test images, which must not choose anything"
    return ""
