"""The report of a comparison: sweep.csv, report.md with plots, the same as a page, and the table on the terminal."""

import base64
import csv
import html
import math
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from string import Template
from textwrap import shorten
from typing import Any

from src.core.errors import UserError, escape_control_characters, format_metric
from src.sweeps import stats
from src.sweeps.plots import plot_comparison
from src.sweeps.runs import STATES, Comparison, compare_runs, format_continue_command, format_train_command, read_runs

VERDICT = "vs. best"
STATISTICS = (
    "CI: of the mean. vs. best: Welch's t-test at 5%, Bonferroni's correction for all pairs of rows; n: runs per row "
    "that tell a tie apart with 80% power."
)
Blocks = list[tuple[str, Any]]  # HTML elements: h1, h2, p and pre of a text, a table of columns, img of a file


def write_report(folders: Sequence[Path], output: Path, average_over: Sequence[str] | None = None) -> Comparison:
    """Compare the runs below the folders, write the report into `output` and print it.

    `average_over` are the keys over which runs are averaged, by default those of the sweeps. Raises UserError if there
    is no run.
    """
    runs, keys_of_sweeps = read_runs(folders)
    comparison = compare_runs(runs, average_over or keys_of_sweeps)
    output.mkdir(parents=True, exist_ok=True)
    write_csv(comparison, output / "sweep.csv")
    blocks = list_blocks(comparison, ", ".join(folder.resolve().name for folder in folders))
    images = plot_comparison(comparison, output)
    figures = [("img", image) for image in images]
    for name, text in {
        "report.md": format_markdown([*blocks, *figures]),
        "report.html": format_html([*blocks[:2], *figures, *blocks[2:]], output),
    }.items():
        (output / name).write_text(text, encoding="utf-8", errors="backslashreplace")
    print(format_markdown(blocks, shutil.get_terminal_size((200, 0)).columns))
    print(f"report in {os.path.relpath(output)}: report.html report.md sweep.csv {' '.join(images)}", flush=True)
    return comparison


def report_ended_sweep(sweep: Path) -> int:
    """Report a sweep whose launcher has ended.

    Returns exit code 0; 1 if a job failed by a bug or has not finished; 2 if one failed by a mistake.
    """
    runs = write_report([sweep], sweep).runs
    if any(run.state == "unfinished" or (run.state == "failed" and run.has_traceback) for run in runs):
        return 1
    return 2 if any(run.state == "failed" for run in runs) else 0


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write one row per run, best group first. Accuracies are fractions, durations seconds."""
    ranked = [run for group in comparison.groups for run in group.runs + group.repeats]
    rows = [
        {"state": run.state}
        | {key: run.get(key) for key in (*comparison.keys, *comparison.average_over)}
        | {key: run.results.get(key) for key in ("data", "parameters", "epochs", "best_epoch")}
        | run.metrics
        | {"seconds": run.seconds or None, "error": run.error}
        | {"overrides": " ".join(run.overrides), "folder": run.folder}
        for run in ranked + [run for run in comparison.runs if run.state != "finished"]
    ]
    with file.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.DictWriter(stream, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def list_blocks(comparison: Comparison, title: str) -> Blocks:
    """Return the content of the report: the table, the best runs, repeats, and runs that have not finished."""
    runs, metric, averaged = comparison.runs, comparison.metric, " and ".join(comparison.average_over) or "nothing"
    counts = Counter(run.state for run in runs)
    states = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    blocks: Blocks = [("h1", title), ("p", f"{len(runs)} run{'s' * (len(runs) != 1)}: {states}")]
    if comparison.groups:
        columns = make_columns(comparison)
        tested = STATISTICS if VERDICT in columns else "Differences are not tested: too few runs per row."
        note = f"Scores at the last epoch: mean ± standard deviation over {averaged}. {tested}"
        blocks += [("table", columns), ("p", note)]
    blocks.append(("h2", "Best"))
    if best := comparison.best:
        order = "lowest" if comparison.lower_is_better else "highest"
        blocks.append(("p", f"{best.name}: {order} {metric}, {best.format_mean(metric)}"))
        blocks.append(("pre", format_train_command(best, comparison.average_over)))
    else:
        blocks.append(("p", f"not ranked: {comparison.reason_not_ranked or 'no score is a number'}"))
    if repeats := [run.folder for group in comparison.groups for run in group.repeats]:
        names = shorten(", ".join(f"{one.parent.name}/{one.name}" for one in repeats), 500, placeholder=" …")
        blocks += [("h2", f"Left out: {len(repeats)}"), ("p", f"same config and {averaged} as another run: {names}")]
    if missing := [run for run in runs if run.state not in ("finished", "pruned")]:
        blocks.append(("h2", f"Not finished: {len(missing)}"))
        blocks += [("p", ": ".join(filter(None, (run.folder.name, run.state, run.error)))) for run in missing]
        for sweep in dict.fromkeys(run.folder.parent / "multirun.yaml" for run in missing):
            with suppress(UserError):  # a run without a sweep
                blocks += [("p", "continue with"), ("pre", format_continue_command(sweep))]
    return blocks


def format_markdown(blocks: Blocks, width: float = math.inf) -> str:
    """Return the report as Markdown. Columns at the right are left out of a table that is wider than `width`."""
    prefixes = {"h1": "# ", "h2": "## ", "p": "", "pre": "    "}
    parts = []
    for kind, content in blocks:
        if kind == "table":
            parts.append("\n".join(_format_table(content, width)))
        elif kind == "img":
            parts.append(f"![{content}]({content})")
        else:
            parts.append(prefixes[kind] + escape_control_characters(content))
    return "\n\n".join(parts) + "\n"


def _format_table(columns: dict[str, list[str]], width: float) -> list[str]:
    """Return the lines of a Markdown table with aligned cells."""
    rows = [list(columns), *zip(*columns.values(), strict=True)]
    cells = [[escape_control_characters(cell).replace("|", "&#124;") for cell in row] for row in rows]
    sizes = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
    while len(sizes) > 2 and sum(sizes) + 3 * len(sizes) >= width:
        sizes.pop()
    cells.insert(1, ["-" * (size - 1) + ":" for size in sizes])
    return [f"| {' | '.join(map(str.rjust, row, sizes))} |" for row in cells]


def format_html(blocks: Blocks, folder: Path) -> str:
    """Return the report as a page of its own: a click on a head sorts the table, and images of `folder` are inside."""
    parts = []
    for kind, content in blocks:
        if kind == "table":
            heads, *rows = (map(html.escape, row) for row in (content, *zip(*content.values(), strict=True)))
            lines = "\n".join(f"<tr><td>{'<td>'.join(row)}" for row in rows)
            parts.append(f"<table><thead><tr><th>{'<th>'.join(heads)}<tbody>{lines}</table>")
        elif kind == "img":
            data = base64.b64encode((folder / content).read_bytes()).decode()
            parts.append(f'<img src="data:image/png;base64,{data}" alt="{content}">')
        else:
            parts.append(f"<{kind}>{html.escape(content)}</{kind}>")
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(blocks[0][1]), body="\n".join(parts))


def make_columns(comparison: Comparison) -> dict[str, list[str]]:
    """Return the columns by their heads, the most important ones first: one cell per group, best group first."""
    groups, metric = comparison.groups, comparison.metric
    columns = {"rank": [str(rank) if group.scores(metric) else "" for rank, group in enumerate(groups, 1)]}
    short = Counter(key.rpartition(".")[2] for key in comparison.keys)
    for key in comparison.keys:
        name = key.rpartition(".")[2]
        columns[name if short[name] == 1 else key] = [group.values[key] for group in groups]
    if metric:
        columns[metric] = [group.format_mean(metric) for group in groups]
    if verdicts := _compare_with_best([group.scores(metric) for group in groups]):
        columns[VERDICT] = [verdicts.get(rank, "") for rank in range(len(groups))]
    if any(len(group.runs) > 1 for group in groups):
        columns["95% CI"] = [_format_interval(metric, group.scores(metric)) for group in groups]
        columns["n"] = [str(len(group.runs)) for group in groups]
    others = {name for group in groups for run in group.runs for name in run.metrics} - {metric}
    for name in sorted(others, key=lambda name: (name.startswith("train"), name)):
        columns[name] = [group.format_mean(name) for group in groups]
    return columns | {"seconds": [f"{fmean(run.seconds for run in group.runs):.1f}" for group in groups]}


def _format_interval(metric: str, scores: list[float]) -> str:
    if len(scores) < 2 or not all(map(math.isfinite, scores)):
        return ""
    limits = stats.confidence_interval(scores)
    if metric.endswith("acc"):  # the interval of two seeds may be wider
        limits = max(limits[0], 0.0), min(limits[1], 1.0)
    return " to ".join(format_metric(metric, limit, digits=4) for limit in limits)


def _compare_with_best(samples: list[list[float]]) -> dict[int, str]:
    """Return by rank whether a group is worse than the best; empty if the best cannot be tested."""
    tested = {rank: one for rank, one in enumerate(samples) if len(one) > 1 and all(map(math.isfinite, one))}
    if len(tested) < 2 or 0 not in tested:
        return {}
    (_, best), *others = tested.items()
    verdicts = {0: "best"}
    for (rank, sample), p in zip(others, stats.corrected_p_values([*tested.values()]), strict=True):
        seeds = stats.required_seeds(best, sample, len(tested))
        verdicts[rank] = "worse" if p <= stats.LEVEL else f"tied (n = {seeds:,})"
    return verdicts
