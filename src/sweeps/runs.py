"""Read the runs below some folders, group those that are averaged, and rank the groups by their mean scores."""

import math
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from sys import intern
from typing import Any

from src.core import run_folder
from src.core.config import iterate_items
from src.core.errors import UserError, format_metric

# Keys in which the runs of a group may differ: where and how a run is computed. Data sets are compared by their names.
IGNORED = {"name", "output_dir", "resume", "sweep", "threads", "trainer.accelerator", "trainer.devices", "data.root"}


@dataclass
class Run:
    """One run: `chosen` has the values of its overrides and config groups, `config` every leaf of its saved config."""

    folder: Path
    state: str  # finished, failed, pruned or unfinished
    overrides: list[str] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # the content of metrics.json, with the sum of its seconds
    metrics: dict[str, float] = field(default_factory=dict)  # those of the last epoch, without learning rates
    error: str = ""
    has_traceback: bool = False

    def get(self, key: str) -> str:
        """Return the value of a key; null, the usual default, if the run is older than the key."""
        return self.config.get(key, self.chosen.get(key, "null"))


@dataclass
class RunGroup:
    """Finished runs that are averaged: their configs differ in nothing but the keys averaged over, as the seed."""

    values: dict[str, str]  # of the keys in which groups differ
    runs: list[Run]

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
    """Groups of runs, best first; those without a score last. `metric` is what ranks them, "" if nothing does."""

    runs: list[Run]  # in the order of their groups, then repeats, then those that have not finished
    repeats: list[Run]  # left out: another run has the same values of the averaged keys as well
    keys: list[str]  # in which groups differ
    average_over: Sequence[str]
    groups: list[RunGroup]
    metric: str
    lower_is_better: bool
    reason_not_ranked: str

    @property
    def best(self) -> RunGroup | None:
        return self.groups[0] if self.groups and math.isfinite(self.groups[0].mean(self.metric)) else None


def format_value(value: Any) -> str:
    """Format a config value so that equal values are equal strings: 0, 0.0 and 0e0 are the same."""
    if isinstance(value, list):
        return f"[{','.join(map(format_value, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{format_value(item)}' for key, item in value.items())}}}"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def format_train_command(group: RunGroup, average_over: Sequence[str] = ("seed",)) -> str:
    """Return the command that trains the runs again, bitwise on the same machine: a run, or a sweep if several."""
    runs, first = group.runs, group.runs[0]
    keys = [key for key in average_over if first.get(key) != "null"]
    zipped = keys if len(keys) > 1 else []
    command = ["python", "-m", "src.train", *["-m"] * (len(runs) > 1)]
    command += [item for item in first.overrides if item.lstrip("+~").partition("=")[0] not in keys]
    command += [f"{key}={','.join(run.get(key) for run in runs)}" for key in keys]
    for key, value in group.values.items():  # of a file of conf/ that was edited between the runs
        if key not in first.chosen and value != "null" and " " not in key:
            command.append(f"{key}={value}")
    if zipped or "sweep" in first.chosen:  # whose file may zip keys, which have one value each now
        command.append(f"hydra.callbacks.sweep.zip=[{','.join(zipped)}]")
    if len(runs) > 1 and keys != ["seed"]:
        command.append(f"hydra.callbacks.sweep.average_over=[{','.join(keys)}]")
    if "threads" not in first.chosen:  # sums over another number of threads are rounded differently
        command.append(f"threads={first.get('threads')}")
    return shlex.join(command)


def read_run(folder: Path) -> Run:
    """Read the run in a folder. One whose files cannot be read is unfinished, and its `error` says why."""
    status = run_folder.read_status(folder)
    run = Run(folder, "unfinished", error=status.get("message", ""), has_traceback=bool(status.get("traceback")))
    try:
        run.overrides = run_folder.read_file(folder / ".hydra/overrides.yaml", list)
        run.chosen = dict(item.lstrip("+~").partition("=")[::2] for item in run.overrides)
        for key, value in iterate_items(run_folder.read_config(folder)):
            if not isinstance(value, dict) and not key.rpartition(".")[2].isdigit():  # a list counts as one value
                run.config[intern(key)] = intern(format_value(value))  # ten thousand runs have few different ones
        if "data.seed" not in run.chosen and run.get("data.seed") == run.get("seed"):
            run.config.pop("data.seed", None)  # it follows the seed by default
        if (folder / run_folder.METRICS_FILE).exists():
            run.results = run_folder.read_file(folder / run_folder.METRICS_FILE)
            run.results["seconds"] = sum(run.results["seconds"].values())
            run.metrics = {key: x for key, x in run.results["metrics"].items() if not re.search("^lr(-|$)|_step$", key)}
            run.chosen = run.results.get("choices", {}) | run.chosen
            run.config["data set"] = run.results.get("data", "null")  # data=auto may be one of two
            run.state = "finished"
        elif status.get("state") in ("failed", "pruned"):
            run.state = status["state"]
    except UserError as error:  # Hydra was killed while it wrote the files, for example
        run.error = str(error)
    return run


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read every run below the folders once, and the keys over which their sweeps average.

    Raises UserError if there is no run.
    """
    runs: dict[Path, Run] = {}
    average_over: list[str] | None = None
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; name a run or a sweep below outputs/")
        for file in sorted(folder.rglob(".hydra")):
            runs.setdefault(file.parent.resolve(), read_run(file.parent))
        for file in folder.rglob("multirun.yaml"):
            with suppress(UserError, TypeError, KeyError):  # cut short while Hydra wrote it
                sweep = run_folder.read_file(file)["hydra"]["callbacks"]["sweep"]
                average_over = list(dict.fromkeys([*(average_over or []), *sweep["average_over"]]))
    if not runs:
        raise UserError(f"{', '.join(map(str, folders))}: no runs in here; name the folder of a sweep")
    return list(runs.values()), ["seed"] if average_over is None else average_over


def compare_runs(runs: Sequence[Run], average_over: Sequence[str] = ("seed",)) -> Comparison:
    """Group the finished runs, and rank the groups by the mean of the metric that their configs optimize.

    The configs of a group are equal in every key but those of `average_over` and IGNORED.
    """
    finished, hidden = [run for run in runs if run.state == "finished"], IGNORED.union(average_over)
    alike: dict[frozenset[tuple[str, str]], dict[tuple[str, ...], Run]] = {}
    repeats = []
    for run in finished:
        items = {(key, value) for key, value in run.config.items() if key not in hidden and value != "null"}
        by_averaged_values = alike.setdefault(frozenset(items), {})
        if by_averaged_values.setdefault(tuple(map(run.get, average_over)), run) is not run:
            repeats.append(run)
    members = [list(group.values()) for group in alike.values()]
    keys = _find_differing_keys([first for first, *_ in members], hidden)
    groups = [RunGroup({key: group[0].get(key) for key in keys}, group) for group in members]

    metrics = {(run.get("optimized_metric"), run.get("optimized_mode")) for run in finished}
    metric, mode = next(iter(metrics), ("", ""))
    reason = explain_no_ranking(metric, any(run.get("data.test_every_epoch") == "true" for run in finished))
    if len(metrics) != 1:
        reason = "the runs differ in optimized_metric or optimized_mode" if metrics else "no run has finished"
    metric, sign = "" if reason else metric, 1 if mode == "min" else -1
    groups.sort(key=lambda group: mean * sign if math.isfinite(mean := group.mean(metric)) else math.inf)
    ordered = [*(run for group in groups for run in group.runs), *repeats]
    ordered += [run for run in runs if run.state != "finished"]
    return Comparison(ordered, repeats, keys, average_over, groups, metric, mode == "min", reason)


def _find_differing_keys(runs: Sequence[Run], hidden: set[str]) -> list[str]:
    """Return the overrides and config groups that differ; if these distinguish not all runs, all keys that differ."""
    names = dict.fromkeys(key for run in runs for key in (*run.chosen, *run.config) if key not in hidden)
    keys = [key for key in names if len({run.get(key) for run in runs}) > 1]
    chosen = [key for key in keys if any(key in run.chosen for run in runs)]
    return chosen if len({tuple(map(run.get, chosen)) for run in runs}) == len(runs) else keys


def explain_no_ranking(metric: str | None, is_tested_every_epoch: bool) -> str:
    """Return why runs may not be ranked by this metric; an empty string if they may."""
    if metric is None or metric == "null":
        return "optimized_metric is null"
    is_test_score = metric.startswith("test/") or is_tested_every_epoch
    return f"{metric} is a score on the test images, which must not choose anything" if is_test_score else ""


def format_continue_command(multirun: Path) -> str:
    """Return the command that started the sweep of a multirun.yaml, with the folder that makes it continue."""
    given = run_folder.read_file(multirun)["hydra"]["overrides"]
    task, hydra = given["task"], given["hydra"]
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
