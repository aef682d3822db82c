"""Plot the network and its losses. Only Matplotlib's figure objects are used, so no window opens."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from src.backprop.network import INPUTS, TARGETS, WEIGHTS

INK, ACCENT = "#22303c", "#c8553d"
CENTERED: dict[str, Any] = {"ha": "center", "va": "center", "color": INK}

# The labels of the path from E to w1: the factors of the chain rule.
PATH_OF_W1 = {
    "w1": r"$\partial h_1/\partial w_1 = i_1$",
    "w5": r"$\partial o_1/\partial a_{h1} = w_5$",
    "w7": r"$\partial o_2/\partial a_{h1} = w_7$",
    "h1": r"$\partial a_{h1}/\partial h_1 = a_{h1}(1-a_{h1})$",
    "o1": r"$\partial E/\partial o_1 = (a_{o1}-t_1)\,a_{o1}(1-a_{o1})$",
    "o2": r"$\partial E/\partial o_2 = (a_{o2}-t_2)\,a_{o2}(1-a_{o2})$",
}
EXAMPLE = {
    **{f"w{n}": f"$w_{n}$ = {weight:.2f}" for n, weight in enumerate(WEIGHTS, start=1)},
    **{f"i{n}": f"{number:.2f}" for n, number in enumerate(INPUTS, start=1)},
    **{f"o{n}": f"$a_{{o{n}}}$ → $E_{n}$,  $t_{n}$ = {number}" for n, number in enumerate(TARGETS, start=1)},
}
NAMES = {f"w{n}": f"$w_{n}$" for n in range(1, 9)} | {f"o{n}": f"$a_{{o{n}}}$ → $E_{n}$" for n in (1, 2)}


def save_figure(figure: Figure, file: Path | BinaryIO) -> None:
    """Save a PNG without the software's name, so that equal figures are equal files."""
    figure.savefig(file, dpi=150, metadata={"Software": None})


def plot_curves(
    curves: Mapping[str, Sequence[float] | np.ndarray],
    x: Sequence[float] | np.ndarray | None = None,
    title: str = "Variation of losses w.r.t. learning rate",
    xlabel: str = "loss number",
    ylabel: str = "E_total",
    scales: Sequence[str] = ("linear", "log"),
) -> Figure:
    """Plot one curve per name in one panel per scale of the y axis; the default x counts from 1."""
    figure = Figure(figsize=(3.5 + 4 * len(scales), 4.5), layout="constrained")
    figure.suptitle(title)
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(curves)))
    for position, scale in enumerate(scales, start=1):
        axes = figure.add_subplot(1, len(scales), position, xlabel=xlabel, ylabel=ylabel)
        for (name, values), color in zip(curves.items(), colors, strict=True):
            axes.plot(range(1, len(values) + 1) if x is None else x, values, label=name, color=color)
        axes.set_yscale(scale)
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, loc="outside right center")
    return figure


def plot_network(labels: Mapping[str, str] = EXAMPLE, is_path: bool = False) -> Figure:
    """Draw the network with `labels` on weights and beside neurons; `is_path` highlights the labelled weights."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-1.3, 9.9), ylim=(-0.55, 3.6), aspect="equal")
    axes.axis("off")
    columns, rows = {"i": 0.0, "h": 3.4, "o": 6.8}, {"1": 2.6, "2": 0.0}

    # w1 and w2 enter h1, w3 and w4 enter h2, and so on: the first of each pair starts at the upper neuron.
    for number in range(1, 9):
        name, (start, end) = f"w{number}", "ih" if number <= 4 else "ho"
        x0, y0 = columns[start], rows["12"[(number - 1) % 2]]
        x1, y1 = columns[end], rows["12"[(number - 1) // 2 % 2]]
        is_highlighted = is_path and name in labels
        arrow = {"arrowstyle": "-|>", "color": "0.8" if is_path else "0.55", "shrinkA": 25, "shrinkB": 27, "lw": 1.3}
        if is_highlighted:
            arrow |= {"arrowstyle": "<|-", "color": ACCENT, "lw": 2.5}
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=arrow)
        # Labels stand near the start, so that those of crossing edges stay apart.
        share = 0.5 if y0 == y1 else 0.55 if is_highlighted else 0.29
        x, y = x0 + share * (x1 - x0), y0 + share * (y1 - y0)
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        axes.text(x, y, labels.get(name, ""), **CENTERED, zorder=5, bbox=box)
    titles = {"i": "inputs", "h": "hidden layer", "o": "output layer"}
    fills = {"i": "#dfe7ec", "h": "#f4e3c8", "o": "#f3d3c8"}
    for letter, x in columns.items():
        axes.text(x, 3.35, titles[letter], ha="center", color="0.4")
        for row, y in rows.items():
            axes.add_patch(Circle((x, y), 0.46, facecolor=fills[letter], edgecolor=INK, lw=1.4, zorder=3))
            axes.text(x, y, f"${letter}_{row}$" + " | σ" * (letter != "i"), **CENTERED, zorder=4, fontsize=12)
    for row, y in rows.items():
        axes.text(-0.6, y, labels.get(f"i{row}", ""), **CENTERED | {"ha": "right"})
        axes.text(7.4, y, labels.get(f"o{row}", ""), **CENTERED | {"ha": "left"})
        axes.text(3.05, y - 0.72, labels.get(f"h{row}", ""), **CENTERED)
    return figure
