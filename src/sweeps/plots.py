"""Plots of a comparison: a heat map of the scores, loss curves, and Optuna's plots of a study."""

import io
import logging
import math
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from src.core.errors import escape_control_characters
from src.core.files import write_atomically
from src.sweeps.runs import Comparison

MAX_CURVES, MAX_LABELED_CELLS = 100, 400


def plot_comparison(comparison: Comparison, study: Any, folder: Path) -> dict[str, str]:
    """Write the plots that the comparison and an Optuna study, or None, allow; return captions by file name."""
    figures: dict[str, Any] = {"heatmap": plot_heat_map(comparison), "losses": plot_loss_curves(comparison)}
    captions = {"heatmap": f"{comparison.metric} over {' and '.join(comparison.keys)}", "losses": "loss curves"}
    if study and any(trial.state.name == "COMPLETE" for trial in study.trials):
        from optuna.visualization import matplotlib as visualization

        with warnings.catch_warnings(action="ignore"):  # Optuna calls them experimental
            figures["history"] = visualization.plot_optimization_history(study).figure
            figures["parameters"] = visualization.plot_parallel_coordinate(study).figure
    for name, figure in figures.items():
        if figure:
            stream = io.BytesIO()
            figure.savefig(stream, dpi=150, bbox_inches="tight")
            plt.close(figure)
            write_atomically(folder / f"{name}.png", stream.getbuffer())
    return {f"{name}.png": captions.get(name, f"{name} of the study") for name, figure in figures.items() if figure}


def _escape(text: object) -> str:
    """Escape control characters and $, which begins a formula in Matplotlib."""
    return escape_control_characters(text).replace("$", r"\$")


def _order(value: str) -> tuple[float, str]:
    """Return a sort key: numbers by size, then words."""
    with suppress(ValueError):
        return float(value), value
    return math.inf, value


def plot_heat_map(comparison: Comparison) -> Figure | None:
    """Plot the mean score over one or two swept keys, the best cell framed; None if most cells would be empty."""
    metric, settings, keys = comparison.metric, comparison.settings, ["", "", *comparison.keys][-2:]
    rows, columns = (sorted({one.values.get(key, "") for one in settings}, key=_order) for key in keys)
    is_grid = len(comparison.keys) in (1, 2) and len(rows) * len(columns) < 2 * len(settings)
    if not comparison.best or not is_grid:
        return None
    size = min(2.4 + 1.3 * len(columns), 30), min(1.6 + 0.8 * len(rows), 30)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    grid = np.full((len(rows), len(columns)), np.nan)
    for setting in settings:
        y, x = (values.index(setting.values.get(key, "")) for values, key in zip((rows, columns), keys, strict=True))
        grid[y, x] = setting.mean(metric) if math.isfinite(setting.mean(metric)) else math.nan
        if len(settings) <= MAX_LABELED_CELLS:
            text = setting.format_mean(metric).replace(" ± ", "\n± ")
            axes.text(x, y, text, ha="center", va="center", bbox={"color": "white", "alpha": 0.5, "pad": 1})
        if setting is comparison.best:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=3))
    # One diverged run must not make all others look alike: the worst fifth shares a color.
    low, high = np.nanquantile(grid, (0, 0.8) if comparison.lower_is_better else (0.2, 1))
    colors = "viridis_r" if comparison.lower_is_better else "viridis"
    figure.colorbar(axes.imshow(grid, cmap=colors, aspect="auto", vmin=low, vmax=high))
    axes.set_xticks(range(len(columns)), map(_escape, columns))
    axes.set_yticks(range(len(rows)), map(_escape, rows))
    axes.set(xlabel=keys[1], ylabel=keys[0], title=_escape(metric))
    return figure


def plot_loss_curves(comparison: Comparison) -> Figure | None:
    """Plot training and validation losses of the best runs, as logged to TensorBoard; None if there are none."""
    runs = [(rank, run) for rank, setting in enumerate(comparison.settings) for run in setting.runs]
    curves = [(rank, _read_losses(run.folder)) for rank, run in runs[:MAX_CURVES]]
    found = {tag for _, losses in curves for tag in losses}
    tags = [tag for tag in ("train/loss", "val/loss") if tag in found] or sorted(found)[:2]
    if not tags:
        return None
    figure, panels = plt.subplots(1, len(tags), figsize=(1 + 5 * len(tags), 5), layout="constrained", squeeze=False)
    for tag, axes in zip(tags, panels[0], strict=True):
        for rank, losses in reversed(curves):
            points = losses.get(tag, {})
            axes.plot(points.keys(), points.values(), ".-" if len(points) < 10 else "-", color=f"C{rank % 10}")
        axes.set(xlabel="step", title=_escape(tag), yscale="log")
        axes.grid(alpha=0.3, which="both")
    for rank, setting in enumerate(comparison.settings[:10]):
        panels[0][0].plot([], [], color=f"C{rank}", label=_escape(setting.name))
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    return figure


def _read_losses(folder: Path) -> dict[str, dict[int, float]]:
    """Return the finite values of each training and validation loss by step; of a step logged twice the last value."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it announces every file, and runs that were resumed
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if "loss" in tag and not tag.startswith("test/")]
    curves = {tag: {one.step: one.value for one in events.Scalars(tag) if math.isfinite(one.value)} for tag in tags}
    return {tag: points for tag, points in curves.items() if points}
