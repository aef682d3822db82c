"""Plots of a comparison: a heat map of the scores, or the scores over each key, and loss curves."""

import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from src.core.errors import escape_control_characters, format_metric
from src.core.plots import label_ends, project_style, save_figure
from src.sweeps.runs import Comparison

MAX_CURVES, MAX_CELLS, MAX_PANELS = 7, 20, 6  # groups with loss curves, cells per row and column, keys


def plot_comparison(comparison: Comparison, folder: Path) -> list[str]:
    """Write the plots for which there are data; return their names."""
    heat_map = plot_heat_map(comparison)
    scores = None if heat_map else plot_scores(comparison)
    figures = {"heatmap.png": heat_map, "scores.png": scores, "losses.png": plot_loss_curves(comparison)}
    written = {name: figure for name, figure in figures.items() if figure}
    for name, figure in written.items():
        save_figure(figure, folder / name)
    return list(written)


def _escape(text: object) -> str:
    """Escape control characters and $, which begins a formula in Matplotlib."""
    return escape_control_characters(text).replace("$", r"\$")


def _order(value: str) -> tuple[float, str]:
    """Return a sort key: numbers by size, then words."""
    with suppress(ValueError):
        return float(value), value
    return math.inf, value


@project_style
def plot_heat_map(comparison: Comparison) -> Figure | None:
    """Plot the mean score over one or two swept keys, the best cell framed; None if most cells would be empty."""
    metric, groups, keys = comparison.metric, comparison.groups, ["", "", *comparison.keys][-2:]
    rows, columns = (sorted({group.values.get(key, "") for group in groups}, key=_order) for key in keys)
    is_grid = len(comparison.keys) in (1, 2) and len(rows) * len(columns) < 2 * len(groups)
    if not comparison.best or not is_grid or max(len(rows), len(columns)) > MAX_CELLS:
        return None
    cells = {(rows.index(one.values.get(keys[0], "")), columns.index(one.values[keys[1]])): one for one in groups}
    grid = np.full((len(rows), len(columns)), np.nan)
    for place, group in cells.items():
        grid[place] = group.mean(metric) if math.isfinite(group.mean(metric)) else math.nan
    figure = Figure(figsize=(3 + 1.3 * len(columns), 1.8 + 0.8 * len(rows)))
    axes: Any = figure.add_subplot()
    # One diverged run must not make all others look alike: the worst fifth shares a color.
    low, high = np.nanquantile(grid, (0, 0.8) if comparison.lower_is_better else (0.2, 1))
    colors, worst = ("Blues_r", "max") if comparison.lower_is_better else ("Blues", "min")
    norm = LogNorm if comparison.lower_is_better and high > 100 * low > 0 else Normalize
    image = axes.imshow(grid, colors, norm(low, high), aspect="auto")
    figure.colorbar(image, format=lambda value, _: format_metric(metric, value), extend=worst)
    for (y, x), group in cells.items():
        is_dark = sum(image.to_rgba(grid[y, x])[:3]) < 1.5
        text = group.format_mean(metric).replace(" ± ", "\n± ")
        axes.text(x, y, text, ha="center", va="center", color="white" if is_dark else "black")
        if group is comparison.best:
            axes.add_patch(Rectangle((x - 0.47, y - 0.47), 0.94, 0.94, fill=False, color="C1", linewidth=4))
    axes.set_xticks(range(len(columns)), map(_escape, columns))
    axes.set_yticks(range(len(rows)), map(_escape, rows))
    axes.tick_params(left=bool(keys[0]), grid_alpha=0)
    spread = ": mean ± SD" * any(len(group.runs) > 1 for group in groups)
    axes.set(xlabel=keys[1], ylabel=keys[0], title=_escape(f"{metric}{spread}, best framed"))
    return figure


@project_style
def plot_scores(comparison: Comparison) -> Figure | None:
    """Plot the mean score of each group over each key in which groups differ, one panel per key."""
    metric, best, keys = comparison.metric, comparison.best, comparison.keys[:MAX_PANELS]
    if not best or not keys:
        return None
    figure = Figure(figsize=(1.5 + 3 * len(keys), 4))
    for axes, key in zip(figure.subplots(1, len(keys), sharey=True, squeeze=False)[0], keys, strict=True):
        numbers = [_order(group.values[key])[0] for group in comparison.groups]
        are_numbers = all(map(math.isfinite, numbers))
        x: list[Any] = numbers if are_numbers else [_escape(group.values[key]) for group in comparison.groups]
        axes.plot(x, [group.mean(metric) for group in comparison.groups], "o", alpha=0.6)
        axes.plot(x[:1], [best.mean(metric)], "o", color="C1", markersize=11)
        axes.set(xlabel=_escape(key))
        if are_numbers and max(numbers) > 20 * min(numbers) > 0:
            axes.set_xscale("log")
    figure.axes[0].yaxis.set_major_formatter(lambda value, _: format_metric(metric, value))
    figure.suptitle(_escape(f"{metric} by key; the best in orange"))
    return figure


@project_style
def plot_loss_curves(comparison: Comparison) -> Figure | None:
    """Plot training and validation losses of the best groups, as logged to TensorBoard; None if there are none."""
    groups = comparison.groups[:MAX_CURVES]
    losses = {run.folder: _read_losses(run.folder) for group in groups for run in group.runs}
    found = {tag for curves in losses.values() for tag in curves}
    tags = [tag for tag in ("train/loss", "val/loss") if tag in found] or sorted(found)[:2]
    if not tags:
        return None
    figure = Figure(figsize=(3 + 5 * len(tags), 4.5))
    for tag, axes in zip(tags, figure.subplots(1, len(tags), squeeze=False)[0], strict=True):
        for rank, group in reversed([*enumerate(groups)]):  # the best on top
            for run in group.runs:
                points, label = losses[run.folder].get(tag, {}), _escape(group.name) if run is group.runs[0] else None
                axes.plot(points.keys(), points.values(), ".-", color=f"C{rank}", label=label)
        axes.set(xlabel="step (batches)", ylabel=_escape(tag), xlim=(0, None))
        axes.set_yscale("log")
    label_ends(axes)
    return figure


def _read_losses(folder: Path) -> dict[str, dict[int, float]]:
    """Return the finite values of each training and validation loss by step; of a step logged twice the last value."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it announces every file, and runs that were resumed
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "loss" in tag and not tag.startswith("test/")]
    curves = {tag: {one.step: one.value for one in events.Scalars(tag) if math.isfinite(one.value)} for tag in tags}
    return {tag: points for tag, points in curves.items() if len(points) > 1}
