"""A comparison as sweep.csv, as report.md, and on the terminal."""

import csv
import io
import math
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from src.core.errors import UserError, escape_control_characters
from src.core.files import write_atomically
from src.core.run_folder import format_continue_command
from src.sweeps.runs import FAILED, FINISHED, NOT_BEGUN, STATUSES, UNFINISHED, Comparison, Setting, command
from src.sweeps.stats import LEVEL, MOST, POWER, confidence_interval, corrected_p_values, required_seeds

ONE_SAMPLE = "one sample"  # what src.backprop.datamodule calls itself
NAMED = 10  # settings that a finding has room to name


def write_csv(comparison: Comparison, file: Path) -> None:
    """A row a job. Accuracies are fractions, durations seconds."""
    metrics = list(dict.fromkeys(name for job in comparison.jobs for name in job.metrics))
    rows: list[dict[str, Any]] = []
    for group in comparison.groups:
        for job in group.jobs:
            facts = {key: job.results.get(key) for key in ("data", "parameters", "epochs", "best_epoch")}
            start = {"status": job.status, **{key: job.value(key) for key in comparison.keys}, "seed": job.seed}
            scores = {name: job.metrics.get(name) for name in metrics}
            end = {
                "seconds": job.seconds if job.status == FINISHED else None,
                "error": job.error,
                "overrides": " ".join(job.overrides),
                "folder": job.folder,
            }
            rows.append({**start, **facts, **scores, **end})
    stream = io.StringIO()
    sheet = csv.DictWriter(stream, rows[0], lineterminator="\n")
    sheet.writeheader()
    sheet.writerows(rows)
    write_atomically(file, stream.getvalue().encode(errors="backslashreplace"))


def number(value: float, metric: str, digits: str = ".4g") -> str:
    """Accuracies in percent, without their unit."""
    return f"{100 * value:.2f}" if metric.endswith("acc") else f"{value:{digits}}"


def score(group: Setting, metric: str) -> str:
    """Mean ± standard deviation over the group's seeds."""
    mean, std = group.mean(metric), group.std(metric)
    if math.isnan(mean):
        return "nan" if group.values(metric) else ""
    return number(mean, metric) + ("" if math.isnan(std) else f" ± {number(std, metric, '.2g')}")


def judged(comparison: Comparison) -> dict[int, float]:
    """By their places among the groups, the p-value of each setting against the best; 1 for the best itself.

    Of those with two finite scores or more; empty where the best has not, or stands alone.
    """
    if not comparison.best:
        return {}
    samples = {place: group.values(comparison.metric or "") for place, group in enumerate(comparison.groups)}
    several = {place: x for place, x in samples.items() if len(x) > 1 and all(map(math.isfinite, x))}
    if 0 not in several or len(several) == 1:
        return {}
    return dict(zip(several, [1.0, *corrected_p_values(list(several.values()))], strict=True))


def summary(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table that people see: a line a setting, the best first; what is the same in all is not.

    The first columns are what nobody can do without: the place, the settings, the score, whether it may be the best.
    """
    there = {name for job in comparison.jobs for name in job.metrics}
    others = ("val/acc", "val/loss", "test/acc", "test/loss", "train/loss")
    metric = comparison.metric or ""
    further = [name for name in others if name in there and name != metric][: 3 - bool(metric)]
    p, ranked = judged(comparison), [bool(group.values(metric)) for group in comparison.groups]
    columns: dict[str, list[str]] = {"": [str(place) if there else "" for place, there in enumerate(ranked, 1)]}
    for key in comparison.keys:
        columns[key] = [group.settings[key] for group in comparison.groups]
    if not comparison.keys:
        columns["run"] = [group.name for group in comparison.groups]
    if metric:
        columns[head(metric)] = [score(group, metric) for group in comparison.groups]
    if p:
        worse = {place for place, value in p.items() if value <= LEVEL}
        first = "yes" if len(worse) == len(p) - 1 else "maybe"
        columns["best?"] = [
            first if place == 0 else "" if place not in p else "no" if place in worse else "maybe"
            for place in range(len(comparison.groups))
        ]
    if any(intervals := [_interval(group, metric) for group in comparison.groups]):
        columns["mean, 95 %"] = intervals
    counts = [(len(group.finished), len(group.jobs)) for group in comparison.groups]
    columns["runs"] = [str(done) if done == jobs else f"{done} of {jobs}" for done, jobs in counts]
    columns["status"] = [group.status for group in comparison.groups]
    for key, usual in ("runs", columns["runs"][0]), ("status", FINISHED):
        if set(columns[key]) == {usual}:
            del columns[key]
    for name in further:
        columns[head(name)] = [score(group, name) for group in comparison.groups]
    seconds = [[job.seconds for job in group.finished] for group in comparison.groups]
    columns["seconds"] = [f"{sum(each) / len(each):.1f}" if each else "" for each in seconds]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def _interval(group: Setting, metric: str) -> str:
    if math.isnan(group.std(metric)):  # fewer than two finite scores
        return ""
    ends = confidence_interval(group.values(metric))
    if metric.endswith("acc"):  # of two seeds it may be wider than that
        ends = max(ends[0], 0.0), min(ends[1], 1.0)
    return " to ".join(number(end, metric) for end in ends)


def head(metric: str) -> str:
    return f"{metric} %" if metric.endswith("acc") else metric


def findings(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What there is to say beside the table: a heading, and its lines; commands are indented by four spaces."""
    said = []
    if best := comparison.best:
        assert comparison.metric
        unit = " %" if comparison.metric.endswith("acc") else ""
        line = f"{best.name}: {comparison.metric} {score(best, comparison.metric)}{unit}, chosen by {comparison.metric}"
        said.append(("Best", [line, f"    {command(best.finished)}"]))
        if len(comparison.groups) > 1:
            said.append(("What the seeds say", seeds(comparison)))
    else:
        said.append(("Best", [f"not ranked: {comparison.why_not or 'no score is a number'}"]))
    if failed := [job for job in comparison.jobs if job.status == FAILED]:
        lines = [line for job in failed for line in (f"{job.folder.name}: {job.error}", f"    {command([job])}")]
        said.append((f"Failed: {len(failed)}", lines))
    if damaged := comparison.damaged:
        said.append((f"Damaged: {len(damaged)}", [f"{job.folder.name}: {job.error}" for job in damaged]))
    missing = [job for job in comparison.jobs if job.status in (UNFINISHED, NOT_BEGUN)]
    if missing:
        lines = [f"{' '.join(f'{key}={job.value(key)}' for key in comparison.keys)}: {job.status}" for job in missing]
        sweeps = {job.folder.parent / "multirun.yaml": None for job in missing}
        commands = []
        for sweep in sweeps:
            with suppress(UserError):  # Hydra was killed while it wrote it, or before
                commands.append(f"    {format_continue_command(sweep)}")
        said.append((f"Not finished: {len(missing)}", [*lines, *(["continue with", *commands] if commands else [])]))
    return said


def seeds(comparison: Comparison) -> list[str]:
    """Which settings differ from the best, and how many seeds would tell of the others."""
    groups, metric, p = comparison.groups, comparison.metric or "", judged(comparison)
    if not p and {job.results.get("data") for group in groups for job in group.finished} == {ONE_SAMPLE}:
        return ["Nothing, and need not: a run of one sample draws no random numbers, so that the order is exact."]
    if not p:
        said = "of one run a setting nobody can tell how much is noise; train the best again with -m 'seed=range(5)'"
        return [f"Nothing: {said}."]
    worse = [groups[place].name for place, value in p.items() if value <= LEVEL]
    alike = {place: groups[place] for place, value in p.items() if value > LEVEL and place}
    lines = [f"different from the best: {listed(worse)}"] * bool(worse)
    lines += [f"cannot be told apart from the best: {listed([group.name for group in alike.values()])}"] * bool(alike)
    if alike:
        second = next(iter(alike.values()))
        needed = required_seeds(groups[0].values(metric), second.values(metric), len(p))
        apart = abs(groups[0].mean(metric) - second.mean(metric))
        size = f"{100 * apart:.2g} points" if metric.endswith("acc") else f"{apart:.2g}"
        count = f"about {needed}" if needed else f"more than {MOST:,}"
        lines.append(f"to find the {size} to {second.name}, {POWER:.0%} of the time, takes {count} seeds a setting")
    if unknown := len([group for group in groups if group.finished]) - len(p):
        lines.append(f"{unknown} without two scores: not compared")
    lines.append(f"(Welch's t-test at {LEVEL:.0%}, Holm's correction for all pairs of the {len(p)} settings)")
    return lines


def listed(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def markdown(comparison: Comparison, title: str, pictures: dict[str, str]) -> str:
    """`pictures` are file names with what they show."""
    heads, rows = summary(comparison)
    lines = [f"# {title}", "", counted(comparison), ""]
    for cells in heads, ["---"] * len(heads), *rows:
        lines.append(f"| {' | '.join(escape_control_characters(cell).replace('|', '&#124;') for cell in cells)} |")
    lines += [
        "",
        "A score is the mean ± the standard deviation over the seeds of equal settings, at the last epoch; the true "
        "mean lies within its interval in 95 of 100 sweeps.",
        "",
    ]
    for heading, said in findings(comparison):
        lines += [f"## {heading}", ""]
        for line in said:
            # A blank line on both sides makes indented lines a block of code.
            lines += [line, ""]
    for file, caption in pictures.items():
        lines += [f"![{caption}]({file})", ""]
    return "\n".join(lines)


def counted(comparison: Comparison) -> str:
    counts = {s: comparison.count(s) for s in STATUSES}
    total = len(comparison.jobs)
    return f"{total} run{'s' * (total != 1)}: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n)


def show(comparison: Comparison, title: str) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # a file has no edge to break lines at
    heads, rows = summary(comparison)
    console.print(f"{title} ({counted(comparison)})", soft_wrap=not console.is_terminal, markup=False)
    needed = 1 + max(1, len(comparison.keys)) + (comparison.metric is not None)
    shown, short = len(heads), [name.rpartition(".")[2] for name in heads]
    table = _table(comparison, heads, rows)
    while console.measure(table, options=console.options.update(width=1000)).maximum > console.width and shown > needed:
        if heads[:shown] != short[:shown] and len(set(short)) == len(short):
            heads = short  # what the keys have in common goes first
        else:
            shown -= 1
        table = _table(comparison, heads[:shown], rows)
    console.print(table)
    if shown < len(heads):
        console.print(f"{', '.join(heads[shown:])}: in report.md", soft_wrap=not console.is_terminal, markup=False)
    for heading, said in findings(comparison):
        console.print(f"{heading}:", markup=False)
        for line in said:
            if line.startswith(" "):
                console.print(
                    copied(line, console.width if console.is_terminal else None), soft_wrap=True, markup=False
                )
            else:
                console.print(Padding(Text(line), (0, 0, 0, 2), expand=False))


def copied(command: str, width: int | None) -> str:
    """A command that survives a copy from a terminal of that width: its lines end between arguments."""
    lines = [""]
    for argument in map(shlex.quote, shlex.split(command)):
        if width and lines[-1] and len(f"      {lines[-1]} {argument} \\") > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {argument}".lstrip()
    return " \\\n".join(f"      {line}" for line in lines)


def _table(comparison: Comparison, heads: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for name in heads:
        table.add_column(name, justify="left" if name in ("run", "status", "best?") else "right", overflow="fold")
    for place, cells in enumerate(rows):
        style = "bold green" if place == 0 and comparison.best else None
        table.add_row(*map(escape, map(escape_control_characters, cells[: len(heads)])), style=style)
    return table
