"""The report of a comparison: sweep.csv, report.md with plots, and the same Markdown on the terminal."""

import csv
import io
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from textwrap import shorten
from typing import Any

from src.core.errors import UserError, escape_control_characters, format_metric, print_error
from src.core.files import write_atomically
from src.core.run_folder import format_continue_command
from src.sweeps import stats
from src.sweeps.plots import plot_comparison
from src.sweeps.runs import STATES, Comparison, compare_runs, format_train_command, read_runs

VERDICT = "vs. best"
STATISTICS = (
    "CI: of the mean. vs. best: Welch's t-test at 5%, Holm's correction for all pairs of settings; n: runs per setting "
    "that tell a tie apart with 80% power."
)


def write_report(
    folders: Sequence[Path], output: Path, average_over: Sequence[str] | None = None, study: Any = None
) -> Comparison:
    """Compare the runs below the folders, write the report into `output` and print it.

    `average_over` are the keys over which runs are averaged, by default those of the sweeps. Raises UserError if there
    is no run.
    """
    runs, keys_of_sweeps = read_runs(folders)
    comparison = compare_runs(runs, average_over or keys_of_sweeps)
    title = escape_control_characters(", ".join(folder.resolve().name for folder in folders))
    write_csv(comparison, output / "sweep.csv")
    images = plot_comparison(comparison, study, output)
    links = "".join(f"\n![{caption}]({file})\n" for file, caption in images.items())
    columns = make_columns(comparison)
    markdown = format_report(comparison, title, columns) + links
    write_atomically(output / "report.md", markdown.encode(errors="backslashreplace"))
    print(format_report(comparison, title, columns, shutil.get_terminal_size((200, 0)).columns))
    print(f"report in {os.path.relpath(output)}: report.md sweep.csv {' '.join(images)}", flush=True)
    for run in runs:
        if run.state == "unreadable":
            print_error(run.error)
    return comparison


def report_ended_sweep(sweep: Path) -> int:
    """Report a sweep whose launcher has ended.

    Returns exit code 0; 1 if a job failed by a bug, has not finished or cannot be read; 2 if one failed by a mistake.
    """
    runs = write_report([sweep], sweep).runs
    if any(run.state in ("unreadable", "unfinished") or (run.state == "failed" and run.has_traceback) for run in runs):
        return 1
    return 2 if any(run.state == "failed" for run in runs) else 0


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write one row per run, best setting first. Accuracies are fractions, durations seconds."""
    ranked = [run for setting in comparison.settings for run in setting.runs + setting.repeats]
    keys = dict.fromkeys([*comparison.keys, *comparison.average_over])
    metrics = dict.fromkeys(name for run in ranked for name in run.metrics)
    rows = [
        {"state": run.state, **{key: run.get(key) for key in keys}}
        | {key: run.results.get(key) for key in ("data", "parameters", "epochs", "best_epoch")}
        | {name: run.metrics.get(name) for name in metrics}
        | {"seconds": run.seconds or None, "error": run.error}
        | {"overrides": " ".join(run.overrides), "folder": run.folder}
        for run in ranked + [run for run in comparison.runs if run.state != "finished"]
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, stream.getvalue().encode(errors="backslashreplace"))


def format_report(comparison: Comparison, title: str, columns: dict[str, list[str]], width: float = math.inf) -> str:
    """Return the report as Markdown. Columns at the right are left out of a table that is wider than `width`."""
    counts = Counter(run.state for run in comparison.runs)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    lines = [f"# {title}", "", f"{len(comparison.runs)} run{'s' * (len(comparison.runs) != 1)}: {states}", ""]
    if comparison.settings:
        averaged = " and ".join(comparison.average_over) or "nothing"
        note = f"Scores at the last epoch: mean ± standard deviation over {averaged}."
        note += f" {STATISTICS}" if VERDICT in columns else " Differences are not tested: too few runs per setting."
        lines += [*_format_table(columns, width), "", note, ""]
    for heading, findings in _list_findings(comparison).items():
        lines += [f"## {heading}", "", *(part for line in findings for part in (escape_control_characters(line), ""))]
    return "\n".join(lines)


def _format_table(columns: dict[str, list[str]], width: float) -> list[str]:
    """Return the lines of a Markdown table with aligned cells."""
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    cells = [[escape_control_characters(cell).replace("|", "&#124;") for cell in row] for row in rows]
    sizes = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
    while len(sizes) > 2 and sum(sizes) + 3 * len(sizes) >= width:
        sizes.pop()
    cells.insert(1, ["-" * (size - 1) + ":" for size in sizes])
    return [f"| {' | '.join(map(str.rjust, row, sizes))} |" for row in cells]


def make_columns(comparison: Comparison) -> dict[str, list[str]]:
    """Return the columns by their heads, the most important ones first: one cell per setting, best setting first."""
    settings, metric = comparison.settings, comparison.metric
    columns = {"rank": [str(rank) if setting.scores(metric) else "" for rank, setting in enumerate(settings, 1)]}
    short = Counter(key.rpartition(".")[2] for key in comparison.keys)
    for key in comparison.keys:
        name = key.rpartition(".")[2]
        columns[name if short[name] == 1 else key] = [setting.values[key] for setting in settings]
    if not comparison.keys:
        columns["run"] = [setting.name for setting in settings]
    if metric:
        columns[metric] = [setting.format_mean(metric) for setting in settings]
    if verdicts := _compare_with_best([setting.scores(metric) for setting in settings]):
        columns[VERDICT] = [verdicts.get(rank, "") for rank in range(len(settings))]
    if any(len(setting.runs) > 1 for setting in settings):
        columns["95% CI"] = [_format_interval(metric, setting.scores(metric)) for setting in settings]
        columns["n"] = [str(len(setting.runs)) for setting in settings]
    others = {name for setting in settings for run in setting.runs for name in run.metrics} - {metric}
    for name in sorted(others, key=lambda name: (name.startswith("train"), name)):
        columns[name] = [setting.format_mean(name) for setting in settings]
    return columns | {"seconds": [f"{fmean(run.seconds for run in setting.runs):.1f}" for setting in settings]}


def _format_interval(metric: str, scores: list[float]) -> str:
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
        return ""
    limits = stats.confidence_interval(scores)
    if metric.endswith("acc"):  # the interval of two seeds may be wider
        limits = max(limits[0], 0.0), min(limits[1], 1.0)
    return " to ".join(format_metric(metric, limit, digits=4) for limit in limits)


def _compare_with_best(samples: list[list[float]]) -> dict[int, str]:
    """Return by rank whether a setting is worse than the best; empty if the best cannot be tested."""
    tested = {rank: one for rank, one in enumerate(samples) if len(one) > 1 and all(map(math.isfinite, one))}
    if len(tested) < 2 or 0 not in tested:
        return {}
    verdicts, p_values = {0: "best"}, stats.corrected_p_values([*tested.values()])
    for (rank, sample), p in zip([*tested.items()][1:], p_values, strict=True):
        verdicts[rank] = "worse"
        if p > stats.LEVEL:
            seeds = stats.required_seeds(tested[0], sample, len(tested))
            verdicts[rank] = f"tied (n = {seeds})" if seeds else f"tied (n > {stats.MAX_SEEDS})"
    return verdicts


def _list_findings(comparison: Comparison) -> dict[str, list[str]]:
    """Return what the table does not say: lines by their heading; commands are indented by four spaces."""
    metric, average_over = comparison.metric, comparison.average_over
    findings = {"Best": [f"not ranked: {comparison.reason_not_ranked or 'no score is a number'}"]}
    if best := comparison.best:
        line = f"{best.name}: {'lowest' if comparison.lower_is_better else 'highest'} {metric}"
        command = f"    {format_train_command(best, average_over)}"
        findings["Best"] = [f"{line}, {best.format_mean(metric)}", command]
    if repeats := [run.folder for setting in comparison.settings for run in setting.repeats]:
        names = shorten(", ".join(f"{one.parent.name}/{one.name}" for one in repeats), 500, placeholder=" …")
        findings[f"Left out: {len(repeats)}"] = [
            f"same config and {' and '.join(average_over)} as another run: {names}"
        ]
    if missing := [run for run in comparison.runs if run.state not in ("finished", "pruned")]:
        lines = [f"{run.folder.name}: {run.state}{': ' * bool(run.error)}{run.error}" for run in missing]
        for sweep in dict.fromkeys(run.folder.parent / "multirun.yaml" for run in missing):
            with suppress(UserError):  # no sweep, or Hydra was killed while it wrote the file
                lines += ["continue with", f"    {format_continue_command(sweep)}"]
        findings[f"Not finished: {len(missing)}"] = lines
    return findings
