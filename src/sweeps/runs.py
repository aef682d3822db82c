"""Read the runs below some folders, group them by their configs and rank the groups by their mean scores."""

import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from sys import intern
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from src.core import run_folder
from src.core.config import iterate_items
from src.core.errors import UserError, format_metric
from src.sweeps.grid import list_jobs_of_sweep

STATES = "finished", "failed", "pruned", "unfinished", "not started", "unreadable"
# Where and how a run is computed, which makes no other setting. The data set counts by its name.
IGNORED = {"name", "output_dir", "resume", "sweep", "threads", "trainer.accelerator", "trainer.devices", "data.root"}


@dataclass
class Run:
    """One run: `named` has the values of its overrides and config groups, `config` every leaf of its saved config."""

    folder: Path
    state: str
    overrides: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # the content of metrics.json
    metrics: dict[str, float] = field(default_factory=dict)  # those of the last epoch, without learning rates
    seconds: float = 0.0
    error: str = ""
    has_traceback: bool = False

    def get(self, key: str) -> str:
        """Return the value of a key; null, the usual default, if the run is older than the key."""
        return self.config.get(key, self.named.get(key, "null"))


@dataclass
class Setting:
    """Finished runs that differ in nothing but the averaged keys, one per combination of these.

    `values` are those of the keys in which settings differ; `repeats` are further runs of the same combinations.
    """

    values: dict[str, str]
    runs: list[Run]
    repeats: list[Run]

    @property
    def name(self) -> str:
        number = self.runs[0].folder.name if len(self.runs) == 1 else f"{len(self.runs)} runs"
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or number

    def scores(self, metric: str) -> list[float]:
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]

    def mean(self, metric: str) -> float:
        return fmean(self.scores(metric) or [math.nan])

    def std(self, metric: str) -> float:
        """Return the sample standard deviation; NaN for fewer than two finite scores."""
        scores = self.scores(metric)
        return stdev(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else math.nan

    def format_mean(self, metric: str) -> str:
        """Return mean ± standard deviation; an empty string without scores."""
        mean = format_metric(metric, self.mean(metric), digits=4) if self.scores(metric) else ""
        std = self.std(metric)
        return mean if math.isnan(std) else f"{mean} ± {format_metric(metric, std, digits=2)}"


@dataclass
class Comparison:
    """Settings, best first; those without a score last. `metric` is what they are ranked by, "" if by nothing."""

    runs: list[Run]
    keys: list[str]  # what differs between settings
    average_over: Sequence[str]
    settings: list[Setting]
    metric: str
    lower_is_better: bool
    reason_not_ranked: str

    @property
    def best(self) -> Setting | None:
        return next((setting for setting in self.settings[:1] if math.isfinite(setting.mean(self.metric))), None)


def format_setting(value: Any) -> str:
    """Format a config value so that equal values are equal strings: 0, 0.0 and 0e0 are one setting."""
    if isinstance(value, list):
        return f"[{','.join(map(format_setting, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{format_setting(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


@cache  # ten thousand jobs have few different overrides
def _parse_override(override: str) -> tuple[str, str]:
    parsed = OverridesParser.create().parse_override(override)
    return parsed.key_or_group, format_setting(parsed.value())


def format_train_command(setting: Setting, average_over: Sequence[str] = ("seed",)) -> str:
    """Return the command that trains the runs again, bitwise on the same machine: a run, or a sweep if several."""
    runs = setting.runs
    first, keys = runs[0], [key for key in average_over if runs[0].get(key) != "null"]
    columns = {key: [run.get(key) for run in runs] for key in keys}
    zipped = keys if len(runs) < math.prod(len({*values}) for values in columns.values()) else []
    command = ["python", "-m", "src.train", *["-m"] * (len(runs) > 1)]
    command += [item for item in first.overrides if _parse_override(item)[0] not in keys]
    command += [f"{key}={','.join(values if zipped else dict.fromkeys(values))}" for key, values in columns.items()]
    for key, value in setting.values.items():  # of a file of conf/ that was edited between the runs
        if key not in first.named and value != "null" and " " not in key:
            command.append(f"{key}={value}")
    if zipped or "sweep" in first.named:  # whose file may zip keys, which have one value each now
        command.append(f"hydra.callbacks.sweep.zip=[{','.join(zipped)}]")
    if len(runs) > 1 and keys != ["seed"]:
        command.append(f"hydra.callbacks.sweep.average_over=[{','.join(keys)}]")
    if first.config and "threads" not in first.named:  # sums over another number of threads are rounded differently
        command.append(f"threads={first.get('threads')}")
    return shlex.join(command)


def read_run(folder: Path) -> Run:
    """Read the run in a folder. One that cannot be read has the state `unreadable` and says why in `error`."""
    status: dict[str, str] = run_folder.read_status(folder) or {}
    state = status.get("state", "")
    run = Run(folder, state if state in STATES else "unfinished", error=status.get("message", ""))
    run.has_traceback = bool(status.get("traceback"))
    try:
        if (folder / run_folder.METRICS_FILE).exists():
            run.state = "finished"
            run.results = run_folder.read_metrics(folder / run_folder.METRICS_FILE)
            run.metrics = {key: x for key, x in run.results["metrics"].items() if not re.search("^lr(-|$)|_step$", key)}
            run.seconds = sum(run.results["seconds"].values())
        run.overrides = run_folder.read_strings(folder / ".hydra/overrides.yaml")
        run.named = run.results.get("choices", {}) | dict(map(_parse_override, run.overrides))
        for key, value in iterate_items(run_folder.read_plain_config(folder / run_folder.CONFIG_FILE)):
            if not isinstance(value, dict) and not key.rpartition(".")[2].isdigit():  # a list counts as one value
                run.config[intern(key)] = intern(format_setting(value))  # ten thousand runs have few different ones
        if "data.seed" not in run.named and run.get("data.seed") == run.get("seed"):
            run.config.pop("data.seed", None)  # it follows the seed by default
        run.config |= {"data set": run.results["data"]} if "data" in run.results else {}  # data=auto may be one of two
    except (UserError, HydraException) as error:
        if run.state != "unfinished":  # in an unfinished run Hydra was killed while it wrote these files
            run.state, run.error = "unreadable", " ".join(str(error).split())
    return run


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run below the folders once, and list the jobs of their sweeps that have not started.

    Also returns the keys over which the sweeps average. Raises UserError if there is no run.
    """
    runs: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run or a sweep below outputs/")
        for file in sorted(folder.rglob(".hydra")):
            runs.setdefault(file.parent.resolve(), read_run(file.parent))
    started = {frozenset(map(_parse_override, run.overrides)) for run in runs.values()}
    average_over: list[str] | None = None
    for file in (file for folder in folders for file in folder.rglob("multirun.yaml")):
        with suppress(UserError, HydraException, TypeError, KeyError, AttributeError):  # cut short while it was written
            hydra = run_folder.read_yaml(file)["hydra"]
            averaged = hydra["callbacks"]["sweep"].get("average_over", ["seed"])  # that of a sweep before it was a key
            average_over = list(dict.fromkeys([*(average_over or []), *averaged]))
            jobs = list_jobs_of_sweep(hydra)
            shared = set.intersection(*map(set, jobs))
            for overrides in jobs:
                named = frozenset(map(_parse_override, overrides))
                path = file.parent / "_".join(sorted({*overrides} - shared)).replace("/", "-")
                if named not in started and not path.exists():  # it exists if the run was trained longer
                    runs[path] = Run(path, "not started", overrides, dict(named))
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no runs in here; name the folder of a sweep")
    return list(runs.values()), ["seed"] if average_over is None else average_over


def compare_runs(runs: list[Run], average_over: Sequence[str] = ("seed",)) -> Comparison:
    """Group finished runs by everything in their configs but the averaged keys and IGNORED, and rank the groups."""
    finished = [run for run in runs if run.state == "finished"]
    hidden = IGNORED.union(average_over)
    groups: dict[frozenset[tuple[str, str]], list[Run]] = {}
    for run in finished:
        items = {(key, value) for key, value in run.config.items() if key not in hidden and value != "null"}
        groups.setdefault(frozenset(items), []).append(run)
    keys = _find_differing_keys([group[0] for group in groups.values()], hidden)
    settings = []
    for group in groups.values():
        distinct: dict[tuple[str, ...], Run] = {}
        repeats = [run for run in group if distinct.setdefault(tuple(map(run.get, average_over)), run) is not run]
        settings.append(Setting({key: group[0].get(key) for key in keys}, [*distinct.values()], repeats))
    metrics = {(run.get("optimized_metric"), run.get("optimized_mode")) for run in finished}
    metric, mode = next(iter(metrics), ("", ""))
    reason = explain_no_ranking(metric, any(run.get("data.test_every_epoch") == "true" for run in finished))
    if len(metrics) != 1:
        reason = "the runs differ in optimized_metric or optimized_mode" if metrics else "no run has finished"
    metric = "" if reason else metric

    def rank(setting: Setting) -> float:
        mean = setting.mean(metric)
        return (mean if mode == "min" else -mean) if math.isfinite(mean) else math.inf

    return Comparison(runs, keys, average_over, sorted(settings, key=rank), metric, mode == "min", reason)


def _find_differing_keys(runs: Sequence[Run], hidden: set[str]) -> list[str]:
    """Return the named keys in which the runs differ, then other keys as far as these do not tell them apart."""
    named = dict.fromkeys(key for run in runs for key in run.named if key not in hidden)
    keys = [key for key in named if len({run.get(key) for run in runs}) > 1]
    for key in dict.fromkeys(key for run in runs for key in run.config if key not in hidden):
        if len({(*map(run.get, keys),) for run in runs}) < len({(*map(run.get, keys), run.get(key)) for run in runs}):
            keys.append(key)
    return keys


def explain_no_ranking(metric: str | None, is_tested_every_epoch: bool) -> str:
    """Return why runs may not be ranked by this metric; an empty string if they may."""
    if metric is None or metric == "null":
        return "optimized_metric is null"
    is_test_score = metric.startswith("test/") or is_tested_every_epoch
    return f"{metric} is a score on the test images, which must not choose anything" if is_test_score else ""
