"""Plots of a comparison: a heat map or a line over what was swept, loss curves, and Optuna's plots of a study."""

import io
import logging
import math
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogFormatter
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

from src.core.errors import escape_control_characters
from src.core.files import write_atomically
from src.sweeps.runs import Comparison
from src.sweeps.tables import format_head, format_mean

MAX_CURVES, MAX_LABELED_CELLS = 100, 400
MAX_COLORS = 10  # settings with a color and a legend entry; further ones are grey


def plot_comparison(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Write the plots that the comparison allows into the folder; return captions by file name."""
    figures = {}
    cells = math.prod(len({setting.values[key] for setting in comparison.settings}) for key in comparison.keys)
    if comparison.best and len(comparison.keys) == 1:
        figures["line.png"] = plot_line(comparison)
    if comparison.best and len(comparison.keys) == 2 and 2 * len(comparison.settings) > cells:  # a grid, not a search
        figures["heatmap.png"] = plot_heat_map(comparison)
    captions = dict.fromkeys(figures, f"{comparison.metric} over {' and '.join(comparison.keys)}")
    if curves := plot_loss_curves(comparison):
        figures["losses.png"] = curves
    for name, figure in figures.items():
        _save(figure, folder / name)
    return captions | ({"losses.png": "loss curves"} if curves else {})


def plot_studies(folders: Iterable[Path], output: Path) -> dict[str, str]:
    """Write Optuna's own plots of the studies among the folders; return captions by file name."""
    captions: dict[str, str] = {}
    for folder in (folder for folder in folders if (folder / "study.db").is_file()):
        import optuna
        from optuna.visualization import matplotlib as visualization

        study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
        scores = {trial.value for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE}
        names = ["optimization_history", "parallel_coordinate"] * (len(scores) > 0)
        for name in names + ["param_importances"] * (len(scores) > 1):
            with warnings.catch_warnings(action="ignore"):  # Optuna calls them experimental
                figure = getattr(visualization, f"plot_{name}")(study).figure
            figure.set_size_inches(8, 5)
            file = f"{study.study_name}_{name}.png"
            _save(figure, output / file, bbox_inches="tight")
            captions[file] = f"{name.replace('_', ' ')} of the study {study.study_name}"
    return captions


def _save(figure: Figure, file: Path, **settings: Any) -> None:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150, **settings)
    plt.close(figure)
    write_atomically(file, stream.getbuffer())


def _escape(text: object) -> str:
    """Escape control characters and $, which begins a formula in Matplotlib."""
    return escape_control_characters(text).replace("$", r"\$")


def _parse_number(value: str) -> float:
    """Return NaN for what is not a number."""
    try:
        return float(value)
    except ValueError:
        return math.nan


def _list_values(comparison: Comparison, key: str) -> list[str]:
    """Return the values of a swept key: numbers by size, then words."""
    values = {setting.values[key] for setting in comparison.settings}
    return sorted(values, key=lambda value: (math.isnan(_parse_number(value)), _parse_number(value), value))


def _make_title(comparison: Comparison) -> str:
    runs = [run.results for setting in comparison.settings for run in setting.finished]
    data, epochs = ("/".join(sorted({str(results.get(key)) for results in runs})) for key in ("data", "epochs"))
    seeds = "/".join(sorted({str(len(setting.finished)) for setting in comparison.settings if setting.finished}))
    head = format_head(comparison.metric or "")
    return _escape(f"{head} ({data}, epochs: {epochs}, seeds per setting: {seeds})")


def plot_heat_map(comparison: Comparison) -> Figure:
    """Plot the mean score over the two swept keys, the best cell framed."""
    metric, (down, across) = comparison.metric or "", comparison.keys
    rows, columns = _list_values(comparison, down), _list_values(comparison, across)
    is_labeled = len(comparison.settings) <= MAX_LABELED_CELLS
    size = (2.4 + 1.3 * len(columns), 1.6 + 0.8 * len(rows)) if is_labeled else (12, 9)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    grid = np.full((len(rows), len(columns)), np.nan)
    outline = [withStroke(linewidth=2, foreground="black")]
    for setting in comparison.settings:
        y, x = rows.index(setting.values[down]), columns.index(setting.values[across])
        grid[y, x] = (100 if metric.endswith("acc") else 1) * setting.mean(metric)
        if setting is comparison.best:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=3))
        if is_labeled:
            label = format_mean(setting, metric).replace(" ± ", "\n± ") or setting.state
            axes.text(x, y, label, ha="center", va="center", color="white", path_effects=outline)
    low, middle, high = np.quantile(grid[np.isfinite(grid)], (0, 0.5, 1))
    # One diverged run must not make all others look alike.
    if comparison.lower_is_better:
        colors, high = "viridis_r", min(high, middle + 4 * (middle - low or high - low))
    else:
        colors, low = "viridis", max(low, middle - 4 * (high - middle or high - low))
    figure.colorbar(axes.imshow(grid, cmap=colors, aspect="auto", vmin=low, vmax=high))
    for set_ticks, values in (axes.set_xticks, columns), (axes.set_yticks, rows):
        step = 1 if is_labeled else 1 + len(values) // 20
        set_ticks(range(0, len(values), step), map(_escape, values[::step]))
    axes.set(xlabel=across, ylabel=down, title=_make_title(comparison))
    return figure


def plot_line(comparison: Comparison) -> Figure:
    """Plot mean ± standard deviation over the one swept key, and each seed as a point."""
    metric, (key,) = comparison.metric or "", comparison.keys
    names = _list_values(comparison, key)
    numbers = [_parse_number(name) for name in names]
    is_numeric = not any(map(math.isnan, numbers))
    positions = dict(zip(names, numbers if is_numeric else range(len(names)), strict=True))
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    means = []
    for setting in comparison.settings:
        scores = (100 if metric.endswith("acc") else 1) * np.array(setting.scores(metric))
        axes.plot([positions[setting.values[key]]] * len(scores), scores, "o", color="C0", alpha=0.35, markersize=4)
        if np.isfinite(scores).all() and len(scores):
            means.append((positions[setting.values[key]], scores.mean(), scores.std(ddof=1) if len(scores) > 1 else 0))
    xs, ys, deviations = zip(*sorted(means), strict=True)
    axes.errorbar(xs, ys, deviations, fmt="o-" if is_numeric else "o", color="C0", capsize=4)
    if is_log := is_numeric and 0 < 10 * min(numbers) <= max(numbers):
        axes.set_xscale("log")
        axes.minorticks_off()
    if is_log or not is_numeric:
        axes.set_xticks(list(positions.values()), map(_escape, positions))
    if comparison.lower_is_better and 0 < 10 * min(ys) <= max(ys):
        axes.set_yscale("log")
        use_plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.set(xlabel=key, ylabel=format_head(metric), title=_make_title(comparison))
    return figure


def plot_loss_curves(comparison: Comparison) -> Figure | None:
    """Plot training and validation losses of the best runs, as logged to TensorBoard; None if there are none."""
    folders = [run.folder for setting in comparison.settings for run in setting.runs if run.folder.is_dir()]
    curves = {folder: _read_losses(folder) for folder in folders[:MAX_CURVES]}
    lengths = {tag: len(steps) for losses in curves.values() for tag, (steps, _) in losses.items()}
    if not lengths:
        return None
    # A run of one epoch has a curve only in the losses of single steps.
    is_short = lengths.get("train/loss") == 1 < lengths.get("train/loss_step", 0)
    tags: list[str] = [tag for tag in ("train/loss_step" if is_short else "train/loss", "val/loss") if tag in lengths]
    tags = tags or sorted(lengths)[:2]
    figure, panels = plt.subplots(1, len(tags), figsize=(1 + 5 * len(tags), 5), layout="constrained", squeeze=False)
    for tag, axes in zip(tags, panels[0], strict=True):
        for rank, setting in enumerate(comparison.settings):
            for number, run in enumerate(setting.runs):
                steps, losses = curves.get(run.folder, {}).get(tag, ([], []))
                color = f"C{rank}" if rank < MAX_COLORS else "lightgrey"
                label = _escape(setting.name) if rank < MAX_COLORS and not number else None
                marker = "o" if len(steps) < 10 else None
                axes.plot(steps, losses, color=color, label=label, marker=marker, markersize=4, zorder=-rank)
        axes.set(xlabel="step", title=_escape(tag), yscale="log")
        use_plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3, which="both")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def use_plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 0.2, not 2×10⁻¹."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _read_losses(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and finite values of each training and validation loss; of a step logged twice the last value."""
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # it announces every file that it opens
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    losses = {}
    for tag in events.Tags()["scalars"]:
        points = {event.step: event.value for event in events.Scalars(tag) if math.isfinite(event.value)}
        if "loss" in tag and not tag.startswith("test/") and points:
            losses[tag] = list(points), list(points.values())
    return losses
