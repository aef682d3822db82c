"""Read the runs below some folders, group those that are averaged, and rank the groups by their mean scores."""

import math
import re
import shlex
from collections.abc import Sequence
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
    state: str  # finished, failed, pruned, unfinished, or repeat: left out, because another run is the same
    error: str = ""
    overrides: list[str] = field(default_factory=list)
    chosen: dict[str, str] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)  # the content of metrics.json, with the sum of its seconds
    metrics: dict[str, float] = field(default_factory=dict)  # those of the last epoch, without learning rates

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
        return " ".join(f"{key}={value}" for key, value in self.values.items()) or "all runs"

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

    runs: list[Run]  # in the order of their groups, then those that are left out
    keys: list[str]  # in which groups differ
    average_over: Sequence[str]
    groups: list[RunGroup]
    best: RunGroup | None  # if its score is a number
    metric: str
    lower_is_better: bool


def format_value(value: Any) -> str:
    """Format a config value so that equal numbers are equal strings: 0, 0.0 and 0e0 are the same."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"{value:.15g}" if isinstance(value, float) else str(value)


def format_train_command(group: RunGroup, average_over: Sequence[str] = ("seed",)) -> str:
    """Return the command that trains the runs again, bitwise on the same machine: a run, or a sweep if several."""
    first = group.runs[0]
    keys = [key for key in average_over if first.get(key) != "null"]
    command = ["python", "-m", "src.train", *["-m"] * (len(group.runs) > 1)]
    command += [item for item in first.overrides if item.lstrip("+~").partition("=")[0] not in keys]
    command += [f"{key}={','.join(dict.fromkeys(run.get(key) for run in group.runs))}" for key in keys]
    command += [f"{k}={x}" for k, x in group.values.items() if k not in first.chosen and x != "null" and " " not in k]
    if len(group.runs) > 1 and keys != ["seed"]:
        command.append(f"hydra.callbacks.sweep.average_over=[{','.join(keys)}]")
    if "threads" not in first.chosen:  # sums over another number of threads are rounded differently
        command.append(f"threads={first.get('threads')}")
    return shlex.join(command)


def read_run(folder: Path) -> Run:
    """Read the run in a folder. One whose files cannot be read is unfinished, and its `error` says why."""
    status = run_folder.read_status(folder)
    state = status["state"] if status.get("state") in ("failed", "pruned") else "unfinished"
    run = Run(folder, state, status.get("message", ""))
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
    except UserError as error:  # Hydra was killed while it wrote the files, for example
        run.error = str(error)
    return run


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read every run below the folders once. Raises UserError if there is no run."""
    if missing := [folder for folder in folders if not any(folder.rglob(".hydra"))]:
        raise UserError(f"{missing[0]}: no runs in here; name a run or a sweep below outputs/")
    files = {file.resolve(): file for folder in folders for file in folder.rglob(".hydra")}
    return [read_run(files[name].parent) for name in sorted(files)]


def compare_runs(runs: Sequence[Run], average_over: Sequence[str] = ("seed",)) -> Comparison:
    """Group the finished runs, and rank the groups by the mean of the metric that their configs optimize.

    The configs of a group are equal in every key but those of `average_over` and IGNORED. A run that has the same
    values of `average_over` as another one of its group is a repeat and does not count.
    """
    hidden = IGNORED.union(average_over)
    alike: dict[frozenset[tuple[str, str]], dict[tuple[str, ...], Run]] = {}
    for run in runs:
        if run.state == "finished":
            items = {(key, value) for key, value in run.config.items() if key not in hidden and value != "null"}
            first = alike.setdefault(frozenset(items), {}).setdefault(tuple(map(run.get, average_over)), run)
            if first is not run:
                run.state, run.error = "repeat", f"same config and {' and '.join(average_over)} as {first.folder.name}"
    members = [list(group.values()) for group in alike.values()]
    firsts = [first for first, *_ in members]
    names = dict.fromkeys(key for run in firsts for key in (*run.chosen, *run.config) if key not in hidden)
    keys = [key for key in names if len({run.get(key) for run in firsts}) > 1]
    chosen = [key for key in keys if any(key in run.chosen for run in firsts)]
    if len({tuple(map(run.get, chosen)) for run in firsts}) == len(firsts):  # overrides and options say it all
        keys = chosen
    groups = [RunGroup({key: group[0].get(key) for key in keys}, group) for group in members]

    ranked_by = ("optimized_metric", "optimized_mode", "data.test_every_epoch")
    settings = {tuple(map(run.get, ranked_by)) for group in members for run in group}
    metric, mode, is_test_score = settings.pop() if len(settings) == 1 else ("null", "", "")
    if metric == "null" or metric.startswith("test/") or is_test_score == "true":
        metric = ""
    sign = 1 if mode == "min" else -1
    groups.sort(key=lambda group: mean * sign if math.isfinite(mean := group.mean(metric)) else math.inf)
    best = groups[0] if groups and math.isfinite(groups[0].mean(metric)) else None
    ordered = [*(run for group in groups for run in group.runs), *(run for run in runs if run.state != "finished")]
    return Comparison(ordered, keys, average_over, groups, best, metric, mode == "min")
