"""A comparison of runs as sweep.csv, as report.md, and on the terminal."""

import csv
import io
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from src.core.errors import UserError, escape_control_characters
from src.core.files import write_atomically
from src.core.run_folder import format_continue_command
from src.sweeps.runs import (
    FAILED,
    FINISHED,
    LOST,
    NOT_STARTED,
    STATES,
    UNFINISHED,
    Comparison,
    Setting,
    format_train_command,
)
from src.sweeps.stats import LEVEL, MAX_SEEDS, POWER, confidence_interval, corrected_p_values, required_seeds

DETERMINISTIC_DATA = "one sample"  # the name of the backprop data, whose runs draw no random numbers
MAX_NAMES = 10  # settings that a finding names


def write_csv(comparison: Comparison, file: Path) -> None:
    """Write one row per run. Accuracies are fractions, durations seconds."""
    metrics = list(dict.fromkeys(name for run in comparison.runs for name in run.metrics))
    rows: list[dict[str, Any]] = [
        {
            "state": run.state,
            **setting.values,
            "seed": run.seed,
            **{key: run.results.get(key) for key in ("data", "parameters", "epochs", "best_epoch")},
            **{name: run.metrics.get(name) for name in metrics},
            "seconds": run.seconds if run.state == FINISHED else None,
            "error": run.error,
            "overrides": " ".join(run.overrides),
            "folder": run.folder,
        }
        for setting in comparison.settings
        for run in setting.runs
    ]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(file, stream.getvalue().encode(errors="backslashreplace"))


def format_score(value: float, metric: str, digits: str = ".4g") -> str:
    """Format accuracies in percent without the sign, other metrics with `digits`."""
    return f"{100 * value:.2f}" if metric.endswith("acc") else f"{value:{digits}}"


def format_mean(setting: Setting, metric: str) -> str:
    """Return mean ± standard deviation over the seeds; an empty string without scores."""
    mean, std = setting.mean(metric), setting.std(metric)
    if math.isnan(mean):
        return "nan" if setting.scores(metric) else ""
    return format_score(mean, metric) + ("" if math.isnan(std) else f" ± {format_score(std, metric, '.2g')}")


def format_head(metric: str) -> str:
    """Return the column head of a metric, with its unit."""
    return f"{metric} %" if metric.endswith("acc") else metric


def compare_with_best(comparison: Comparison) -> dict[int, float]:
    """Return the p-value of each setting against the best by its rank, 1 for the best itself.

    Only settings with two finite scores or more; empty if the best has fewer, or is the only one.
    """
    if not comparison.best:
        return {}
    scores = {rank: setting.scores(comparison.metric or "") for rank, setting in enumerate(comparison.settings)}
    samples = {rank: x for rank, x in scores.items() if len(x) > 1 and all(map(math.isfinite, x))}
    if 0 not in samples or len(samples) == 1:
        return {}
    return dict(zip(samples, [1.0, *corrected_p_values(list(samples.values()))], strict=True))


def summarize(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table, one row per setting, best first; columns with equal cells are left out.

    The first columns are the most important ones: rank, settings, score, comparison with the best.
    """
    settings, metric = comparison.settings, comparison.metric or ""
    logged = {name for run in comparison.runs for name in run.metrics}
    usual = ("val/acc", "val/loss", "test/acc", "test/loss", "train/loss")
    others = [name for name in usual if name in logged and name != metric][: 3 - bool(metric)]
    ranked, p = [bool(setting.scores(metric)) for setting in settings], compare_with_best(comparison)
    columns = {"": [str(rank) if is_ranked else "" for rank, is_ranked in enumerate(ranked, 1)]}
    columns |= {key: [setting.values[key] for setting in settings] for key in comparison.keys}
    if not comparison.keys:
        columns["run"] = [setting.name for setting in settings]
    if metric:
        columns[format_head(metric)] = [format_mean(setting, metric) for setting in settings]
    if p:
        is_alone = sum(value > LEVEL for value in p.values()) == 1  # the best itself
        words = {rank: "worse" if value <= LEVEL else "tied" for rank, value in p.items()}
        columns["vs. best"] = [
            (words | {0: "best" if is_alone else "tied"}).get(rank, "") for rank in range(len(ranked))
        ]
    intervals = [_format_interval(setting, metric) for setting in settings]
    if any(intervals):
        columns["95% CI"] = intervals
    counts = [(len(setting.finished), len(setting.runs)) for setting in settings]
    runs = [str(finished) if finished == total else f"{finished} of {total}" for finished, total in counts]
    states = [setting.state for setting in settings]
    columns |= {"runs": runs} if len({*runs}) > 1 or "of" in runs[0] else {}
    columns |= {"state": states} if {*states} != {FINISHED} else {}
    columns |= {format_head(name): [format_mean(setting, name) for setting in settings] for name in others}
    seconds = [[run.seconds for run in setting.finished] for setting in settings]
    columns["seconds"] = [f"{sum(values) / len(values):.1f}" if values else "" for values in seconds]
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _format_interval(setting: Setting, metric: str) -> str:
    if math.isnan(setting.std(metric)):  # fewer than two finite scores
        return ""
    low, high = confidence_interval(setting.scores(metric))
    if metric.endswith("acc"):  # the interval of two seeds may be wider
        low, high = max(low, 0.0), min(high, 1.0)
    return f"{format_score(low, metric)} to {format_score(high, metric)}"


def list_findings(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return what the table does not say: headings with their lines; commands are indented by four spaces."""
    findings = []
    if (best := comparison.best) and (metric := comparison.metric):
        unit = "%" if metric.endswith("acc") else ""
        line = f"{best.name}: {metric} {format_mean(best, metric)}{unit}, chosen by {metric}"
        findings.append(("Best", [line, f"    {format_train_command(best.finished)}"]))
        if len(comparison.settings) > 1:
            findings.append(("Significance", _describe_significance(comparison, metric)))
    else:
        reason = comparison.reason_not_ranked or "no score is a number"
        findings.append(("Best", [f"not ranked: {reason}"]))
    failed = [run for run in comparison.runs if run.state in (FAILED, LOST)]
    if failed:
        pairs = [(f"{run.folder.name}: {run.error}", f"    {format_train_command([run])}") for run in failed]
        findings.append((f"Failed: {len(failed)}", [line for pair in pairs for line in pair]))
    if comparison.unreadable:
        lines = [f"{run.folder.name}: {run.error}" for run in comparison.unreadable]
        findings.append((f"Unreadable: {len(lines)}", lines))
    missing = [run for run in comparison.runs if run.state in (UNFINISHED, NOT_STARTED, LOST)]
    if missing:
        lines = [
            f"{' '.join(f'{key}={run.settings.get(key)}' for key in comparison.keys)}: {run.state}" for run in missing
        ]
        commands = []
        for sweep in dict.fromkeys(run.folder.parent / "multirun.yaml" for run in missing):
            with suppress(UserError):  # Hydra was killed before or while it wrote the file
                commands.append(f"    {format_continue_command(sweep)}")
        findings.append(
            (f"Not finished: {len(missing)}", [*lines, *(["continue with", *commands] if commands else [])])
        )
    return findings


def _describe_significance(comparison: Comparison, metric: str) -> list[str]:
    settings, p = comparison.settings, compare_with_best(comparison)
    if not p and {run.results.get("data") for run in comparison.runs if run.results} == {DETERMINISTIC_DATA}:
        return ["not needed: runs on one sample draw no random numbers, so the order is exact"]
    if not p:
        return ["not tested (one seed per setting); train the best again with -m 'seed=range(5)'"]
    worse = [settings[rank].name for rank, value in p.items() if value <= LEVEL]
    tied = [settings[rank] for rank, value in p.items() if value > LEVEL and rank]
    lines = [f"worse than the best: {_join(worse)}"] * bool(worse)
    if tied:
        lines.append(f"tied with the best: {_join([setting.name for setting in tied])}")
        seeds = required_seeds(settings[0].scores(metric), tied[0].scores(metric), len(p))
        gap = abs(settings[0].mean(metric) - tied[0].mean(metric))
        size = f"{100 * gap:.2g} points" if metric.endswith("acc") else f"{gap:.2g}"
        count = f"about {seeds}" if seeds else f"more than {MAX_SEEDS:,}"
        lines.append(f"finding the {size} to {tied[0].name} with {POWER:.0%} power takes {count} seeds per setting")
    if untested := sum(bool(setting.finished) for setting in settings) - len(p):
        lines.append(f"not tested: {untested} without two scores")
    return [*lines, f"(Welch's t-test at {LEVEL:.0%}, Holm's correction for all pairs of {len(p)} settings)"]


def _join(names: list[str]) -> str:
    return ", ".join(names[:MAX_NAMES]) + (f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else "")


def count_states(comparison: Comparison) -> str:
    """Return how many runs there are in each state."""
    counts = {state: sum(run.state == state for run in comparison.runs) for state in STATES}
    total = len(comparison.runs)
    return f"{total} run{'s' * (total != 1)}: " + ", ".join(f"{n} {state}" for state, n in counts.items() if n)


def format_markdown(comparison: Comparison, title: str, images: dict[str, str]) -> str:
    """Return report.md. `images` are file names with their captions."""
    heads, rows = summarize(comparison)
    lines = [f"# {title}", "", count_states(comparison), ""]
    for row in heads, ["---"] * len(heads), *rows:
        cells = (escape_control_characters(cell).replace("|", "&#124;") for cell in row)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Scores are mean ± standard deviation over seeds at the last epoch, with the 95% confidence interval.",
        "",
    ]
    for heading, findings in list_findings(comparison):
        lines += [f"## {heading}", "", *(part for line in findings for part in (line, ""))]
    lines += [part for file, caption in images.items() for part in (f"![{caption}]({file})", "")]
    return "\n".join(lines)


def print_comparison(comparison: Comparison, title: str) -> None:
    """Print the table and the findings. A terminal shows the columns up to the scores; report.md has them all."""
    console = Console(highlight=False)
    is_terminal = console.is_terminal
    heads, rows = summarize(comparison)
    shown = len(heads)
    if is_terminal:
        shown = (
            1 + max(1, len(comparison.keys)) + sum(head in heads for head in ("vs. best", "95% CI", "runs", "state"))
        )
        shown += comparison.metric is not None
    else:
        console.width = 200
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads[:shown]:
        is_text = head in ("run", "state", "vs. best")
        table.add_column(head.rpartition(".")[2] if is_terminal else head, justify="left" if is_text else "right")
    for rank, row in enumerate(rows):
        cells = [Text(escape_control_characters(cell)) for cell in row[:shown]]
        table.add_row(*cells, style="bold green" if rank == 0 and comparison.best else None)
    console.print(f"{title} ({count_states(comparison)})", soft_wrap=not is_terminal, markup=False)
    console.print(table)
    if shown < len(heads):
        console.print(f"also in report.md: {', '.join(heads[shown:])}", markup=False)
    for heading, findings in list_findings(comparison):
        console.print(f"{heading}:", markup=False)
        for line in findings:
            is_command = line.startswith(" ")  # a command stays on one line, to be copied
            text = Text(f"  {line}") if is_command else Padding(Text(line), (0, 0, 0, 2), expand=False)
            console.print(text, soft_wrap=is_command or not is_terminal)
