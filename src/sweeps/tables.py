"""A comparison as sweep.csv, as report.md, and on the terminal."""

import csv
import io
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from src.command.process import write_whole
from src.command.resume import continue_command
from src.errors import UserError, printable
from src.sweeps.jobs import (
    FAILED,
    FINISHED,
    NOT_BEGUN,
    STATUSES,
    UNFINISHED,
    Comparison,
    Group,
    command,
)


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
    write_whole(file, stream.getvalue().encode(errors="backslashreplace"))


def score(group: Group, metric: str) -> str:
    """Mean ± standard deviation over the group's seeds; accuracies in percent."""
    percent = metric.endswith("acc")
    mean, std = (100 * x if percent else x for x in (group.mean(metric), group.std(metric)))
    if math.isnan(mean):
        return "nan" if group.values(metric) else ""
    form = ".2f" if percent else ".4g"
    return f"{mean:{form}}" + ("" if math.isnan(std) else f" ± {std:{form if percent else '.2g'}}")


def summary(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the table that people see: a line a setting, the best first."""
    there = {name for job in comparison.jobs for name in job.metrics}
    others = ("val/acc", "val/loss", "test/acc", "test/loss", "train/loss")
    metrics = [comparison.metric] if comparison.metric else []
    metrics += [name for name in others if name in there and name not in metrics][: 3 - len(metrics)]
    heads = ["", *(comparison.keys or ["run"])]
    heads += [f"{name} %" if name.endswith("acc") else name for name in metrics] + ["runs", "seconds", "status"]
    rows = []
    for rank, group in enumerate(comparison.groups, 1):
        done, seconds = group.finished, [job.seconds for job in group.finished]
        rows.append(
            [
                str(rank) if comparison.metric and group.values(comparison.metric) else "",
                *(group.settings.values() or [group.name]),
                *(score(group, name) for name in metrics),
                str(len(done)) if len(done) == len(group.jobs) else f"{len(done)} of {len(group.jobs)}",
                f"{sum(seconds) / len(seconds):.1f}" if seconds else "",
                group.status,
            ]
        )
    return heads, rows


def findings(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """What there is to say beside the table: a heading, and its lines; commands are indented by four spaces."""
    said = []
    if best := comparison.best:
        assert comparison.metric
        unit = " %" if comparison.metric.endswith("acc") else ""
        line = f"{best.name}: {comparison.metric} {score(best, comparison.metric)}{unit}, chosen by {comparison.metric}"
        said.append(("Best", [line, f"    {command(best.finished)}"]))
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
                commands.append(f"    {continue_command(sweep)}")
        said.append((f"Not finished: {len(missing)}", [*lines, *(["continue with", *commands] if commands else [])]))
    return said


def markdown(comparison: Comparison, title: str, pictures: dict[str, str]) -> str:
    """`pictures` are file names with what they show."""
    heads, rows = summary(comparison)
    lines = [f"# {title}", "", counted(comparison), ""]
    for cells in heads, ["---"] * len(heads), *rows:
        lines.append(f"| {' | '.join(printable(cell).replace('|', '&#124;') for cell in cells)} |")
    lines += [
        "",
        "A score is the mean ± the standard deviation over the seeds of equal settings, at the last epoch.",
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
    console.print(f"{title} ({counted(comparison)})", soft_wrap=True, markup=False)
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="left" if head in ("run", "status") else "right", overflow="fold")
    for number, cells in enumerate(rows):
        table.add_row(
            *map(escape, map(printable, cells)), style="bold green" if number == 0 and comparison.best else None
        )
    console.print(table)
    for heading, said in findings(comparison):
        # Commands must survive a copy from the terminal, so nothing here is wrapped.
        console.print(f"{heading}:", *said, sep="\n  ", soft_wrap=True, markup=False)
