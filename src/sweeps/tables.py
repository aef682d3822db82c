"""A comparison of runs as sweep.csv, as report.md, and on the terminal."""

import csv
import io
import math
from collections import Counter
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from textwrap import shorten

from rich import box
from rich.console import Console
from rich.table import Table

from src.core.errors import UserError, escape_control_characters
from src.core.files import write_atomically
from src.core.run_folder import format_continue_command
from src.sweeps import runs, stats
from src.sweeps.runs import Comparison, Setting, format_train_command

DETERMINISTIC_DATA = "one sample"  # the name of the backprop data, whose runs draw no random numbers


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write one row per run. Accuracies are fractions, durations seconds."""
    metrics = dict.fromkeys(name for run in comparison.runs for name in run.metrics)
    rows = [
        {"state": run.state, **setting.values, "seed": run.seed}
        | {key: run.results.get(key) for key in ("data", "parameters", "epochs", "best_epoch")}
        | {name: run.metrics.get(name) for name in metrics}
        | {"seconds": run.seconds or None, "error": run.error}
        | {"overrides": " ".join(run.overrides), "folder": run.folder}
        for setting in comparison.settings
        for run in setting.runs
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, stream.getvalue().encode(errors="backslashreplace"))


def format_head(metric: str) -> str:
    """Return the column head of a metric, with its unit."""
    return f"{metric} %" if metric.endswith("acc") else metric


def format_score(value: float, metric: str, digits: int = 4) -> str:
    """Format accuracies in percent without the sign, other metrics with `digits` significant digits."""
    return f"{100 * value:.2f}" if metric.endswith("acc") else f"{value:.{digits}g}"


def format_mean(setting: Setting, metric: str) -> str:
    """Return mean ± standard deviation over the seeds; an empty string without scores."""
    mean, std = setting.mean(metric), setting.std(metric)
    if math.isnan(std):
        return format_score(mean, metric) if setting.scores(metric) else ""
    return f"{format_score(mean, metric)} ± {format_score(std, metric, digits=2)}"


def compare_with_best(comparison: Comparison) -> dict[int, float]:
    """Return the p-value of each setting against the best by its rank, 1 for the best itself.

    Only settings with two finite scores or more; empty if the best has fewer, or is the only one.
    """
    is_tested = [not math.isnan(setting.std(comparison.metric)) for setting in comparison.settings]
    if not is_tested[0] or sum(is_tested) == 1:
        return {}
    ranks = [rank for rank, is_in in enumerate(is_tested) if is_in]
    samples = [comparison.settings[rank].scores(comparison.metric) for rank in ranks]
    return dict(zip(ranks, [1.0, *stats.corrected_p_values(samples)], strict=True))


def make_columns(comparison: Comparison, p: dict[int, float]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the main and the other columns, by head the cells of each: one per setting, best first."""
    settings, metric = comparison.settings, comparison.metric or ""
    main = {"": [str(rank) if setting.scores(metric) else "" for rank, setting in enumerate(settings, 1)]}
    main |= {key: [setting.values[key] for setting in settings] for key in comparison.keys}
    if not comparison.keys:
        main["run"] = [setting.name for setting in settings]
    if metric:
        main[format_head(metric)] = [format_mean(setting, metric) for setting in settings]
    if p:
        words = {rank: "worse" if value <= stats.LEVEL else "tied" for rank, value in p.items()}
        words[0] = "tied" if list(words.values()).count("tied") > 1 else "best"
        main["vs. best"] = [words.get(rank, "") for rank in range(len(settings))]
    intervals = [_format_interval(setting, metric) for setting in settings]
    counts = [f"{len(setting.finished)} of {len(setting.runs)}" for setting in settings]
    states = [setting.state for setting in settings]
    main |= {"95% CI": intervals} if any(intervals) else {}
    main |= {"runs": counts} if len({*counts}) > 1 else {}
    main |= {"state": states} if {*states} != {runs.FINISHED} else {}
    logged = {name for run in comparison.runs for name in run.metrics} - {metric}
    usual = [name for name in ("val/acc", "val/loss", "test/acc", "test/loss", "train/loss") if name in logged]
    others = {format_head(name): [format_mean(setting, name) for setting in settings] for name in usual}
    seconds = [[run.seconds for run in setting.finished] for setting in settings]
    return main, others | {"seconds": [f"{fmean(values):.1f}" if values else "" for values in seconds]}


def _format_interval(setting: Setting, metric: str) -> str:
    if math.isnan(setting.std(metric)):  # fewer than two finite scores
        return ""
    limits = stats.confidence_interval(setting.scores(metric))
    if metric.endswith("acc"):  # the interval of two seeds may be wider
        limits = max(limits[0], 0.0), min(limits[1], 1.0)
    return " to ".join(format_score(limit, metric) for limit in limits)


def list_findings(comparison: Comparison, p: dict[int, float]) -> dict[str, list[str]]:
    """Return what the table does not say: lines by their heading; commands are indented by four spaces."""
    findings = {"Best": [f"not ranked: {comparison.reason_not_ranked or 'no score is a number'}"]}
    if (best := comparison.best) and (metric := comparison.metric):
        unit = "%" if metric.endswith("acc") else ""
        command = f"    {format_train_command(best.finished)}"
        findings["Best"] = [f"{best.name}: {metric} {format_mean(best, metric)}{unit}, chosen by {metric}", command]
        if len(comparison.settings) > 1:
            findings["Significance"] = _describe_significance(comparison, p, metric)
    failed = [run for run in comparison.runs if run.state in (runs.FAILED, runs.LOST)]
    if failed:
        pairs = [(f"{run.folder.name}: {run.error}", f"    {format_train_command([run])}") for run in failed]
        findings[f"Failed: {len(failed)}"] = [line for pair in pairs for line in pair]
    if comparison.unreadable:
        findings["Unreadable"] = [f"{run.folder.name}: {run.error}" for run in comparison.unreadable]
    missing = [run for run in comparison.runs if run.state in (runs.UNFINISHED, runs.NOT_STARTED, runs.LOST)]
    if missing:
        settings = [" ".join(f"{key}={run.settings.get(key)}" for key in comparison.keys) for run in missing]
        lines = [f"{setting or run.folder.name}: {run.state}" for setting, run in zip(settings, missing, strict=True)]
        for sweep in dict.fromkeys(run.folder.parent / "multirun.yaml" for run in missing):
            with suppress(UserError):  # Hydra was killed before or while it wrote the file
                lines += ["continue with", f"    {format_continue_command(sweep)}"]
        findings[f"Not finished: {len(missing)}"] = lines
    return findings


def _describe_significance(comparison: Comparison, p: dict[int, float], metric: str) -> list[str]:
    settings = comparison.settings
    if not p and {run.results.get("data") for run in comparison.runs if run.results} == {DETERMINISTIC_DATA}:
        return ["not needed: runs on one sample draw no random numbers, so the order is exact"]
    if not p:
        return ["not tested (one seed per setting); train the best again with -m 'seed=range(5)'"]
    worse = [settings[rank].name for rank, value in p.items() if value <= stats.LEVEL]
    tied = [settings[rank] for rank, value in p.items() if value > stats.LEVEL and rank]
    lines = [f"worse than the best: {shorten(', '.join(worse), 500, placeholder=' …')}"] * bool(worse)
    if tied:
        names = shorten(", ".join(setting.name for setting in tied), 500, placeholder=" …")
        gap = abs(settings[0].mean(metric) - tied[0].mean(metric))
        size = f"{100 * gap:.2g} points" if metric.endswith("acc") else f"{gap:.2g}"
        seeds = stats.required_seeds(settings[0].scores(metric), tied[0].scores(metric), len(p))
        count = f"about {seeds}" if seeds else f"more than {stats.MAX_SEEDS:,}"
        lines.append(f"tied with the best: {names}")
        lines.append(f"finding the {size} to {tied[0].name} with 80% power takes {count} seeds per setting")
    return [
        *lines,
        f"(Welch's t-test at 5%, Holm's correction for all pairs of {len(p)} settings with two seeds or more)",
    ]


def count_states(comparison: Comparison) -> str:
    """Return how many runs there are in each state."""
    counts = Counter(run.state for run in comparison.runs)
    parts = [f"{counts[state]} {state}" for state in runs.STATES if counts[state]]
    return f"{len(comparison.runs)} run{'s' * (len(comparison.runs) != 1)}: {', '.join(parts)}"


def format_markdown(comparison: Comparison, title: str, images: dict[str, str]) -> str:
    """Return report.md. `images` are file names with their captions."""
    p = compare_with_best(comparison)
    main, others = make_columns(comparison, p)
    columns = main | others
    lines = [f"# {title}", "", count_states(comparison), ""]
    for row in columns, ["---"] * len(columns), *zip(*columns.values(), strict=True):
        lines.append(f"| {' | '.join(escape_control_characters(cell).replace('|', '&#124;') for cell in row)} |")
    lines += ["", "Scores at the last epoch: mean ± standard deviation over seeds; CI of the mean over seeds.", ""]
    for heading, findings in list_findings(comparison, p).items():
        lines += [f"## {heading}", "", *(part for line in findings for part in (line, ""))]
    return "\n".join(lines + [f"![{caption}]({file})\n" for file, caption in images.items()])


def print_comparison(comparison: Comparison, title: str) -> None:
    """Print the main columns of the table, and the findings."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    p = compare_with_best(comparison)
    columns, _ = make_columns(comparison, p)
    table = Table(box=box.SIMPLE_HEAD)
    for head in columns:
        is_text = head in ("run", "vs. best", "state")
        table.add_column(head if is_text else head.rpartition(".")[2], justify="left" if is_text else "right")
    for rank, row in enumerate(zip(*columns.values(), strict=True)):
        is_best = rank == 0 and comparison.best
        table.add_row(*map(escape_control_characters, row), style="bold green" if is_best else None)
    print(f"{title} ({count_states(comparison)})")
    console.print(table)
    for heading, findings in list_findings(comparison, p).items():
        print(f"{heading}:", *(f"  {escape_control_characters(line)}" for line in findings), sep="\n")
