"""Plots of a comparison: a heat map or a line over what was swept, loss curves, and Optuna's plots of a study."""

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
from src.sweeps.runs import Comparison
from src.sweeps.tables import format_head, format_mean

MAX_CURVES, MAX_LABELED_CELLS = 100, 400
MAX_COLORS = 10  # settings with a color and a legend entry; further ones are grey


def plot_comparison(comparison: Comparison, folder: Path) -> dict[str, str]:
    """Write the plots that the comparison allows into the folder; return captions by file name."""
    captions = {}
    counts = [len({setting.values[key] for setting in comparison.settings}) for key in comparison.keys]
    by = " and ".join(comparison.keys)
    # A random search is no grid: its heat map would be mostly empty.
    if comparison.best and len(counts) == 2 and 2 * len(comparison.settings) > counts[0] * counts[1]:
        _save(plot_heat_map(comparison), folder / "heatmap.png")
        captions["heatmap.png"] = f"{comparison.metric} over {by}"
    if comparison.best and len(counts) == 1:
        _save(plot_line(comparison), folder / "line.png")
        captions["line.png"] = f"{comparison.metric} over {by}"
    if figure := plot_loss_curves(comparison):
        _save(figure, folder / "losses.png")
        captions["losses.png"] = "loss curves"
    return captions


def plot_studies(folders: Iterable[Path], output: Path) -> dict[str, str]:
    """Write Optuna's own plots of the studies among the folders; return captions by file name."""
    captions: dict[str, str] = {}
    for folder in (folder for folder in folders if (folder / "study.db").is_file()):
        import optuna
        from optuna.visualization import matplotlib as visualization

        study = optuna.load_study(study_name=None, storage=f"sqlite:///{folder / 'study.db'}")
        values = {trial.value for trial in study.trials if trial.state == optuna.trial.TrialState.COMPLETE}
        plots = ["optimization_history", "parallel_coordinate"] * bool(values)
        plots += ["param_importances"] * (len(values) > 1)
        for name in plots:
            with warnings.catch_warnings(action="ignore"):  # Optuna calls them experimental
                axes = getattr(visualization, f"plot_{name}")(study)
            axes.figure.set_size_inches(8, 5)
            file = f"{study.study_name}_{name}.png"
            _save(axes.figure, output / file, bbox_inches="tight")
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


def _parse_number(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _sort(values: Iterable[str]) -> list[str]:
    """Sort numbers by size and words alphabetically."""
    return sorted({*values}, key=lambda value: (_parse_number(value) is None, _parse_number(value) or 0.0, value))


def _make_title(comparison: Comparison) -> str:
    runs = [run for setting in comparison.settings for run in setting.finished]
    data, epochs = (_sort(str(run.results.get(key)) for run in runs) for key in ("data", "epochs"))
    seeds = _sort(str(len(setting.finished)) for setting in comparison.settings if setting.finished)
    facts = f"{'/'.join(data)}, epochs: {'/'.join(epochs)}, seeds per setting: {'/'.join(seeds)}"
    return _escape(f"{format_head(comparison.metric or '')} ({facts})")


def plot_heat_map(comparison: Comparison) -> Figure:
    """Plot the mean score over the two swept keys, the best cell framed."""
    metric = comparison.metric or ""
    scale = 100 if metric.endswith("acc") else 1
    rows, columns = (_sort(setting.values[key] for setting in comparison.settings) for key in comparison.keys)
    by_cell = {tuple(setting.values.values()): setting for setting in comparison.settings}
    grid = np.full((len(rows), len(columns)), np.nan)
    for (row, column), setting in by_cell.items():
        grid[rows.index(row), columns.index(column)] = scale * setting.mean(metric)
    low, high, extend = _find_color_limits(grid, comparison.lower_is_better)
    is_labeled = len(by_cell) <= MAX_LABELED_CELLS
    size = (2.4 + 1.3 * len(columns), 1.6 + 0.8 * len(rows)) if is_labeled else (12, 9)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    colors = "viridis_r" if comparison.lower_is_better else "viridis"
    image = axes.imshow(grid, cmap=colors, aspect="auto", vmin=low, vmax=high)
    figure.colorbar(image, extend=extend)
    for (row, column), setting in by_cell.items() if is_labeled else ():
        y, x = rows.index(row), columns.index(column)
        label, color = format_mean(setting, metric).replace(" ± ", "\n± ") or setting.state, "firebrick"
        if not math.isnan(grid[y, x]):
            is_dark = np.dot(image.cmap(image.norm(grid[y, x]))[:3], (0.299, 0.587, 0.114)) < 0.5
            color = "white" if is_dark else "black"
        axes.text(x, y, label, ha="center", va="center", color=color)
        if setting is comparison.best:
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="red", linewidth=3))
    steps = (1, 1) if is_labeled else (-(-len(columns) // 12), -(-len(rows) // 20))
    axes.set_xticks(range(0, len(columns), steps[0]), map(_escape, columns[:: steps[0]]))
    axes.set_yticks(range(0, len(rows), steps[1]), map(_escape, rows[:: steps[1]]))
    axes.set(xlabel=comparison.keys[1], ylabel=comparison.keys[0], title=_make_title(comparison))
    return figure


def _find_color_limits(grid: np.ndarray, lower_is_better: bool) -> tuple[float, float, str]:
    """Limit the colors, so that one diverged run does not make all others look alike."""
    scores = grid[np.isfinite(grid)]
    low, middle, high = scores.min(), np.median(scores), scores.max()
    if lower_is_better and high > (limit := middle + 4 * (middle - low)) > low:
        return low, limit, "max"
    if not lower_is_better and low < (limit := middle - 4 * (high - middle)) < high:
        return limit, high, "min"
    return low, high, "neither"


def plot_line(comparison: Comparison) -> Figure:
    """Plot mean ± standard deviation over the one swept key, and each seed as a point."""
    metric, (key,) = comparison.metric or "", comparison.keys
    scale = 100 if metric.endswith("acc") else 1
    names = _sort(setting.values[key] for setting in comparison.settings)
    numbers = [number for name in names if (number := _parse_number(name)) is not None]
    is_numeric = len(numbers) == len(names)
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    means = []
    for setting in comparison.settings:
        x = float(setting.values[key]) if is_numeric else names.index(setting.values[key])
        scores = [scale * score for score in setting.scores(metric) if math.isfinite(score)]
        axes.plot([x] * len(scores), scores, "o", color="C0", alpha=0.35, markersize=4)
        if scores:
            means.append((x, scale * setting.mean(metric), scale * setting.std(metric)))
    xs, ys, deviations = zip(*sorted(means), strict=True)
    axes.errorbar(xs, ys, np.nan_to_num(deviations), fmt="o-" if is_numeric else "o", color="C0", capsize=4)
    if not is_numeric:
        axes.set_xticks(range(len(names)), list(map(_escape, names)))
    elif min(numbers) > 0 and max(numbers) >= 10 * min(numbers):
        axes.set_xscale("log")
        axes.set_xticks(numbers, names)
        axes.minorticks_off()
    if comparison.lower_is_better and min(ys) > 0 and max(ys) >= 10 * min(ys):
        axes.set_yscale("log")
        use_plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3)
    axes.set(xlabel=key, ylabel=format_head(metric), title=_make_title(comparison))
    return figure


def plot_loss_curves(comparison: Comparison) -> Figure | None:
    """Plot training and validation losses of the best runs, as logged to TensorBoard; None if there are none."""
    folders = [run.folder for setting in comparison.settings for run in setting.runs if run.folder.is_dir()]
    curves = {folder: _read_losses(folder) for folder in folders[:MAX_CURVES]}
    lengths: dict[str, int] = {}
    for losses in curves.values():
        lengths |= {tag: max(lengths.get(tag, 0), len(steps)) for tag, (steps, _) in losses.items()}
    if not lengths:
        return None
    # A run of one epoch has a curve only in the losses of single steps.
    has_one_epoch = lengths.get("train/loss") == 1 < lengths.get("train/loss_step", 0)
    usual = ("train/loss_step" if has_one_epoch else "train/loss", "val/loss")
    tags = [tag for tag in usual if tag in lengths] or sorted(lengths)[:2]
    figure, panels = plt.subplots(1, len(tags), figsize=(1 + 5 * len(tags), 5), layout="constrained", squeeze=False)
    for tag, axes in zip(tags, panels[0], strict=True):
        _plot_panel(comparison, tag, curves, axes)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize="small")
    return figure


def use_plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: 0.2, not 2×10⁻¹."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1, 0.4)))


def _plot_panel(comparison: Comparison, tag: str, curves: dict[Path, dict[str, tuple]], axes: Axes) -> None:
    for rank, setting in enumerate(comparison.settings):
        color, label = (f"C{rank}", _escape(setting.name)) if rank < MAX_COLORS else ("lightgrey", None)
        for run in setting.runs:
            steps, losses = curves.get(run.folder, {}).get(tag, ([], []))
            style: Any = {"marker": "o", "markersize": 4} if len(steps) < 10 else {}
            axes.plot(steps, losses, color=color, label=label, zorder=-rank, **style)  # the best on top
            label = None
    axes.set(xlabel="step", title=_escape(tag), yscale="log")
    use_plain_ticks(axes.yaxis)
    axes.grid(alpha=0.3, which="both")


def _read_losses(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and finite values of each scalar that has "loss" in its tag, without the test's."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # a resumed run repeats steps, as it would warn
    losses = {}
    try:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points = {event.step: event.value for event in events.Scalars(tag) if math.isfinite(event.value)}
            if "loss" in tag and not tag.startswith("test/") and points:
                losses[tag] = (list(points), list(points.values()))
    except Exception as error:  # damaged files raise many kinds of errors
        print(escape_control_characters(f"warning: {folder}: its curves cannot be read ({error})"), file=sys.stderr)
    return losses
