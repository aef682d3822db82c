"""A comparison drawn: a heat map or a line over what was swept, and the loss curves on top of each other."""

import io
import logging
import math
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogFormatter
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from src.core.errors import escape_control_characters
from src.core.files import write_atomically
from src.sweeps.runs import FINISHED, Comparison, Setting
from src.sweeps.tables import score

LINES, NUMBERS = 100, 400  # a picture shows no more runs, or writes in no more cells
CURVES = 10  # with a colour and a line in the legend; further ones are grey


def draw(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Writes what can be drawn into the folder; gives the file names with what they show."""
    pictures = {}
    # A search makes no grid, and a map of it would be mostly empty.
    cells = [len({group.settings[key] for group in comparison.groups}) for key in comparison.keys]
    if comparison.best and len(cells) == 2 and 2 * len(comparison.groups) > cells[0] * cells[1]:
        pictures["heatmap.png"] = _save(heat_map(comparison), folder / "heatmap.png", comparison)
    if comparison.best and len(comparison.keys) == 1:
        pictures["line.png"] = _save(line(comparison), folder / "line.png", comparison)
    if curves := loss_curves(comparison):
        _write(curves, folder / "losses.png")
        pictures["losses.png"] = "loss curves"
    return pictures


def draw_studies(folders: Iterable[Path], output: Path) -> dict[str, str]:
    """Optuna's own pictures of the searches among the folders: what mattered, how it went, what went together."""
    pictures: dict[str, str] = {}
    for folder in (folder for folder in folders if (folder / "study.db").is_file()):
        import optuna
        from optuna.visualization import matplotlib as own

        study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
        done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        plots: dict[str, Any] = {"history": own.plot_optimization_history, "parallel": own.plot_parallel_coordinate}
        if len({trial.value for trial in done}) > 1:  # else it has nothing to explain
            plots["importance"] = own.plot_param_importances
        for name, plot in plots.items() if done else ():
            with warnings.catch_warnings(action="ignore"):  # all three are experimental
                axes = plot(study)
            axes.figure.set_size_inches(8, 5)
            file = f"{name}.png" if not pictures.get(f"{name}.png") else f"{folder.name}_{name}.png"
            _write(axes.figure, output / file, bbox_inches="tight")  # parallel coordinates take no layout engine
            pictures[file] = f"{name} of the search {study.study_name}"
    return pictures


def _save(figure: Figure, file: Path, comparison: Comparison) -> str:
    _write(figure, file)
    return f"{comparison.metric} over {' and '.join(comparison.keys)}"


def _write(figure: Figure, file: Path, **how: Any) -> None:
    content = io.BytesIO()
    figure.savefig(content, dpi=150, **how)
    plt.close(figure)
    write_atomically(file, content.getbuffer())


def _plain(text: object) -> str:
    """As matplotlib writes it, which takes what stands between two $ for a formula."""
    return escape_control_characters(text).replace("$", r"\$")


def _sorted(values: Iterable[str]) -> list[str]:
    """Numbers by size, words by letters."""
    return sorted(set(values), key=lambda value: (_number(value) is None, _number(value) or 0.0, value))


def _number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _label(comparison: Comparison) -> str:
    assert comparison.metric
    return f"{comparison.metric} in %" if comparison.metric.endswith("acc") else comparison.metric


def _title(comparison: Comparison) -> str:
    """The metric and where it comes from: data, epochs, seeds."""
    done = [job for job in comparison.jobs if job.status == FINISHED]
    facts = {
        "": {str(job.results.get("data")) for job in done},
        " epochs": {str(job.results.get("epochs")) for job in done},
        " seeds a setting": {str(len(group.finished)) for group in comparison.groups if group.finished},
    }
    parts = [f"{'/'.join(_sorted(values))}{unit}" for unit, values in facts.items()]
    title = _plain(f"{_label(comparison)} ({', '.join(parts)})")
    return title.replace(" 1 epochs", " 1 epoch").replace(" 1 seeds", " 1 seed")


def heat_map(comparison: Comparison) -> Figure:
    assert comparison.metric and comparison.best
    down, across = comparison.keys
    rows, columns = (_sorted(group.settings[key] for group in comparison.groups) for key in comparison.keys)
    scale = 100 if comparison.metric.endswith("acc") else 1
    grid = np.full((len(rows), len(columns)), np.nan)
    groups: dict[tuple[int, int], Setting] = {}
    for group in comparison.groups:
        place = rows.index(group.settings[down]), columns.index(group.settings[across])
        groups[place], grid[place] = group, scale * group.mean(comparison.metric)

    low, high, extend = _colour_range(grid, comparison.lower_is_better)
    written = len(groups) <= NUMBERS
    size = (2.4 + 1.3 * len(columns), 1.6 + 0.8 * len(rows)) if written else (12, 9)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    colours = "viridis_r" if comparison.lower_is_better else "viridis"
    image = axes.imshow(grid, cmap=colours, aspect="auto", vmin=low, vmax=high)
    figure.colorbar(image, extend=extend)
    for (y, x), group in groups.items() if written else ():
        shown = score(group, comparison.metric).replace(" ± ", "\n± ") or group.status
        if math.isnan(grid[y, x]):
            axes.text(x, y, shown, ha="center", va="center", color="firebrick")
            continue
        red, green, blue, _ = image.cmap(image.norm(grid[y, x]))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(x, y, shown, ha="center", va="center", color="white" if dark else "black")
        if group is comparison.best:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=3))
    across_by, down_by = (1, 1) if written else (-(-len(columns) // 12), -(-len(rows) // 20))
    axes.set(
        xticks=range(0, len(columns), across_by), xticklabels=map(_plain, columns[::across_by]),
        yticks=range(0, len(rows), down_by), yticklabels=map(_plain, rows[::down_by]),
        xlabel=across, ylabel=down, title=_title(comparison),
    )  # fmt: skip
    return figure


def _colour_range(grid: np.ndarray, lower_is_better: bool) -> tuple[float, float, str]:
    """Limits of the colours: one diverged run must not make all others look alike."""
    scores = grid[np.isfinite(grid)]
    low, middle, high = scores.min(), np.median(scores), scores.max()
    if lower_is_better and high > (limit := middle + 4 * (middle - low)) > low:
        return low, limit, "max"
    if not lower_is_better and low < (limit := middle - 4 * (high - middle)) < high:
        return limit, high, "min"
    return low, high, "neither"


def line(comparison: Comparison) -> Figure:
    """Means with their standard deviations, and each seed as a point."""
    assert comparison.metric
    (key,) = comparison.keys
    scale = 100 if comparison.metric.endswith("acc") else 1
    names = _sorted(group.settings[key] for group in comparison.groups)
    numbers = [x for name in names if (x := _number(name)) is not None]
    numeric = len(numbers) == len(names)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    means = []
    for group in comparison.groups:
        x = float(group.settings[key]) if numeric else names.index(group.settings[key])
        values = [scale * value for value in group.values(comparison.metric) if math.isfinite(value)]
        axes.plot([x] * len(values), values, "o", color="C0", alpha=0.35, markersize=4)
        if values:
            means.append((x, scale * group.mean(comparison.metric), scale * group.std(comparison.metric)))
    xs, ys, errors = zip(*sorted(means), strict=True)
    axes.errorbar(xs, ys, np.nan_to_num(errors), fmt="o-" if numeric else "o", color="C0", capsize=4)
    if not numeric:
        axes.set_xticks(range(len(names)), list(map(_plain, names)))
    elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
        axes.set_xscale("log")
        axes.set_xticks(numbers, names)
        axes.minorticks_off()
    if comparison.lower_is_better and min(ys) > 0 and max(ys) >= 10 * min(ys):
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.set(xlabel=key, ylabel=_label(comparison), title=_title(comparison))
    return figure


def loss_curves(comparison: Comparison) -> Figure | None:
    """Training and validation losses of the best LINES runs, as logged for TensorBoard; None if they logged none."""
    ranked = [job.folder for group in comparison.groups for job in group.jobs if job.folder.is_dir()]
    curves = {folder: _losses(folder) for folder in ranked[:LINES]}
    points: dict[str, int] = {}
    for found in curves.values():
        for tag, (steps, _) in found.items():
            points[tag] = max(points.get(tag, 0), len(steps))
    if not points:
        return None
    # Runs of one epoch have a curve only in the losses of single steps.
    train = "train/loss_step" if points.get("train/loss") == 1 < points.get("train/loss_step", 0) else "train/loss"
    tags = [tag for tag in (train, "val/loss") if tag in points] or sorted(points)[:2]
    figure, panels = plt.subplots(1, len(tags), figsize=(1 + 5 * len(tags), 5), layout="constrained", squeeze=False)
    for tag, axes in zip(tags, panels[0], strict=True):
        _panel(comparison, tag, curves, axes)
    lines, names = panels[0][0].get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=2, fontsize="small")
    return figure


def plain_ticks(axis: Axis) -> None:
    """Labels of a logarithmic axis as one writes numbers: 0.2, not 2×10⁻¹."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _panel(comparison: Comparison, tag: str, curves: dict[Path, dict[str, tuple]], axes: Axes) -> None:
    for rank, group in enumerate(comparison.groups):
        drawn = [curves[job.folder][tag] for job in group.jobs if tag in curves.get(job.folder, {})]
        for number, (steps, losses) in enumerate(drawn):
            axes.plot(
                steps,
                losses,
                color=f"C{rank}" if rank < CURVES else "lightgrey",
                label=_plain(group.name) if number == 0 and rank < CURVES else None,
                marker="o" if len(steps) < 10 else None,
                markersize=4,
                zorder=CURVES - min(rank, CURVES),  # the best on top
            )
    axes.set(xlabel="step", ylabel=_plain(tag), title=_plain(tag), yscale="log")
    plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="both")


def _losses(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and finite values of each scalar with "loss" in its name; the last value logged for a step counts."""
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it announces every file that it opens
    scalars: dict[str, list[Any]] = {}
    try:
        if odd := next((file for file in folder.glob("*tfevents*") if not file.is_file()), None):
            raise ValueError(f"{odd.name} is not a file")
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    except Exception as error:  # damaged bytes raise whatever they like
        print(escape_control_characters(f"warning: {folder}: its curves cannot be read ({error})"), file=sys.stderr)
    found = {}
    for tag, logged in scalars.items():
        points = {event.step: event.value for event in logged if math.isfinite(event.value)}
        if "loss" in tag and not tag.startswith("test/") and points:
            found[tag] = (list(points), list(points.values()))
    return found
