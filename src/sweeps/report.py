"""The report of a comparison: sweep.csv, report.md with plots, the same as a page, and the table on the terminal."""

import base64
import csv
import html
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from string import Template

from markdown_it import MarkdownIt

from src.core.errors import escape_control_characters
from src.sweeps.plots import plot_comparison
from src.sweeps.runs import Comparison, compare_runs, format_train_command, read_runs

SCORES = "Scores at the last epoch: mean ± standard deviation over"
TESTS = "vs. best, for rows of several runs: Welch's t-test at 5%, Bonferroni-corrected for all pairs of rows."


def write_report(folders: Sequence[Path], output: Path, average_over: Sequence[str] = ("seed",)) -> Comparison:
    """Compare the runs below the folders, write the report into `output` and print it.

    `average_over` are the keys over which runs are averaged. Raises UserError if there is no run.
    """
    comparison = compare_runs(read_runs(folders), average_over)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(comparison, output / "sweep.csv")
    title = ", ".join(filter(None, [" × ".join(comparison.keys), *(folder.resolve().name for folder in folders)]))
    images = plot_comparison(comparison, output)
    report = format_report(comparison, title, images)
    page = format_html(report, title, [output / image for image in images])
    for file, text in (output / "report.md", report), (output / "report.html", page):
        file.write_text(text, encoding="utf-8", errors="backslashreplace")
    print(format_report(comparison, title, width=shutil.get_terminal_size((200, 0)).columns))
    print(f"report in {os.path.relpath(output)}: report.html report.md sweep.csv {' '.join(images)}", flush=True)
    return comparison


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write one row per run, best group first. Accuracies are fractions, durations seconds."""
    rows = [
        {"state": run.state}
        | {key: run.get(key) for key in (*comparison.keys, *comparison.average_over)}
        | {key: run.results.get(key) for key in ("data", "parameters", "epochs", "best_epoch", "seconds")}
        | run.metrics
        | {"error": run.error, "overrides": " ".join(run.overrides), "folder": run.folder}
        for run in comparison.runs
    ]
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def format_report(comparison: Comparison, title: str, images: Sequence[str] = (), width: float = math.inf) -> str:
    """Return the report as Markdown: plots, the table, the best runs, and the runs that do not count.

    Columns at the right are left out of a table that is wider than `width`.
    """
    states = ", ".join(f"{count} {state}" for state, count in Counter(run.state for run in comparison.runs).items())
    lines = [f"# {title}", "", f"{len(comparison.runs)} runs: {states}", ""]
    for image in images:
        lines += [f"![{image}]({image})", ""]
    if comparison.groups:
        averaged = " and ".join(comparison.average_over)
        lines += [*_format_table(make_columns(comparison), width), "", f"{SCORES} {averaged}. {TESTS}", ""]
    lines += ["## Best", ""]
    if best := comparison.best:
        order = "lowest" if comparison.lower_is_better else "highest"
        lines += [f"{best.name}: {order} {comparison.metric}, {best.format_mean(comparison.metric)}", ""]
        lines += [f"    {format_train_command(best, comparison.average_over)}", ""]
    else:
        lines += ["not ranked: all runs must have one optimized_metric, which is not a score on test images", ""]
    if left_out := [run for run in comparison.runs if run.state not in ("finished", "pruned")]:
        lines += [f"## Left out: {len(left_out)}", ""]
        for run in left_out:
            lines += [": ".join(filter(None, (run.folder.name, run.state, run.error))), ""]
    return "\n".join(map(escape_control_characters, lines))


def _format_table(columns: dict[str, list[str]], width: float) -> list[str]:
    """Return the lines of a Markdown table with aligned cells."""
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    sizes = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
    while len(sizes) > 2 and sum(sizes) + 3 * len(sizes) >= width:
        sizes.pop()
    cells.insert(1, ["-" * (size - 1) + ":" for size in sizes])
    return [f"| {' | '.join(map(str.rjust, row, sizes))} |" for row in cells]


def format_html(markdown: str, title: str, images: Sequence[Path]) -> str:
    """Return the report as a page of its own: a click on a head sorts the table, and its images are inside."""
    body = MarkdownIt("zero").enable(["heading", "table", "code"]).render(markdown)  # all else is plain text
    for file in images:
        image = f'<img src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}" alt="{file.name}">'
        body = body.replace(f"![{file.name}]({file.name})", image)
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), body=body)


def make_columns(comparison: Comparison) -> dict[str, list[str]]:
    """Return the columns by their heads, the most important ones first: one cell per group, best group first."""
    groups, metric = comparison.groups, comparison.metric
    columns = {"rank": [str(rank) if group.scores(metric) else "" for rank, group in enumerate(groups, 1)]}
    if metric:
        columns[metric] = [group.format_mean(metric) for group in groups]
    for key in comparison.keys:
        name = key.rpartition(".")[2]
        columns[key if name in columns else name] = [group.values[key] for group in groups]
    if any(len(group.runs) > 1 for group in groups):
        from src.sweeps.stats import compare_with_best, format_interval  # only if needed: SciPy takes a second

        if verdicts := compare_with_best(groups, metric):
            columns["vs. best"] = verdicts
        columns["95% CI"] = [format_interval(group, metric) for group in groups]
        columns["n"] = [str(len(group.runs)) for group in groups]
    others = {name for group in groups for run in group.runs for name in run.metrics} - {metric}
    for name in sorted(others, key=lambda name: (name.startswith("train"), name)):
        columns[name] = [group.format_mean(name) for group in groups]
    return columns | {"seconds": [f"{fmean(run.results['seconds'] for run in group.runs):.1f}" for group in groups]}
