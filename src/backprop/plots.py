"""The pictures of the backprop experiment. Matplotlib's objects alone: no window is ever opened."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle

from src.backprop.network import INPUTS, TARGETS, WEIGHTS

INK, ACCENT = "#22303c", "#c8553d"


def save(figure: Figure, path: Path | BinaryIO) -> None:
    # No software name or date inside, so that equal pictures are equal files.
    figure.savefig(path, dpi=150, metadata={"Software": None})


def _axes(figure: Figure, title: str, position: int = 111, **labels: str) -> Axes:
    axes = figure.add_subplot(position)
    axes.set(title=title, **labels)
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _colours(count: int) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0, 0.9, count))


def all_losses(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Left as they are; right on a logarithmic scale, where they go on falling for all to see."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    figure.suptitle("Variation of losses w.r.t. learning rate")
    for position, scale in ((121, "linear"), (122, "log")):
        axes = _axes(figure, "", position, xlabel="loss number", ylabel="E_total")
        for (name, values), colour in zip(losses.items(), _colours(len(losses)), strict=True):
            axes.plot(range(1, len(values) + 1), values, label=name, color=colour)
        axes.set_yscale(scale)
    axes.legend(frameon=False, title="learning rate")
    return figure


def one_loss(name: str, values: Sequence[float]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = _axes(figure, f"Loss at learning rate {name}", xlabel="loss number", ylabel="E_total")
    axes.plot(range(1, len(values) + 1), values, color=ACCENT)
    axes.set_ylim(bottom=0)
    return figure


# The way back from E to w1: what each link multiplies with.
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


def network(labels: Mapping[str, str] = EXAMPLE, path: bool = False) -> Figure:
    """The network. `labels` are for weights, and stand beside neurons; with `path` what they are at is lit."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlim=(-1.3, 9.9), ylim=(-0.55, 3.6), aspect="equal")
    axes.axis("off")
    columns = {"i": 0, "h": 3.4, "o": 6.8}
    places = {f"{layer}{row}": (x, 2.6 if row == 1 else 0) for layer, x in columns.items() for row in (1, 2)}

    # w1 and w2 enter h1, w3 and w4 enter h2, and so on: the first of each pair comes from the upper neuron.
    for number in range(1, 9):
        name = f"w{number}"
        lit = path and name in labels
        layer = "ih" if number <= 4 else "ho"
        source, target = f"{layer[0]}{1 + (number - 1) % 2}", f"{layer[1]}{1 + (number - 1) // 2 % 2}"
        (x0, y0), (x1, y1) = places[source], places[target]
        axes.annotate(
            "",
            (x1, y1),
            (x0, y0),
            arrowprops={
                "arrowstyle": "<|-" if lit else "-|>",
                "color": ACCENT if lit else "0.8" if path else "0.55",
                "shrinkA": 25,
                "shrinkB": 27,
                "lw": 2.5 if lit else 1.3,
            },
        )
        # Near the source, so that the labels of crossing edges stay apart.
        share = 0.5 if y0 == y1 else 0.55 if lit else 0.29
        axes.text(
            x0 + share * (x1 - x0),
            y0 + share * (y1 - y0),
            labels.get(name, ""),
            ha="center",
            va="center",
            color=INK,
            zorder=5,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
        )
    fills = {"i": "#dfe7ec", "h": "#f4e3c8", "o": "#f3d3c8"}
    for name, (x, y) in places.items():
        axes.add_patch(Circle((x, y), 0.46, facecolor=fills[name[0]], edgecolor=INK, lw=1.4, zorder=3))
        label = f"${name[0]}_{name[1]}$" if name[0] == "i" else f"${name[0]}_{name[1]}$ | σ"
        axes.text(x, y, label, ha="center", va="center", color=INK, zorder=4, fontsize=12)
    for row, y in ((1, 2.6), (2, 0)):
        axes.text(-0.6, y, labels.get(f"i{row}", ""), ha="right", va="center", color=INK)
        axes.text(7.4, y, labels.get(f"o{row}", ""), va="center", color=INK)
        axes.text(3.05, y - 0.72, labels.get(f"h{row}", ""), ha="center", va="center", color=INK)
    for name, x in (("inputs", 0), ("hidden layer", 3.4), ("output layer", 6.8)):
        axes.text(x, 3.35, name, ha="center", color="0.4")
    return figure


def slip(right: Mapping[str, Sequence[float]], slipped: Mapping[str, Sequence[float]]) -> Figure:
    """How far the losses move when the gradient of w3 and w4 has the spreadsheet's slip."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = _axes(figure, "What the slip changes", xlabel="loss number", ylabel="loss with slip − loss without")
    for name, colour in zip(right, _colours(len(right)), strict=True):
        difference = np.subtract(slipped[name], right[name])
        axes.plot(range(1, len(difference) + 1), difference, label=name, color=colour)
    figure.legend(frameon=False, title="learning rate", loc="outside right center")
    return figure


def past_two(rates: Sequence[float], curves: Mapping[int, Sequence[float]], limit: float) -> Figure:
    """`curves` maps a loss number to one loss a rate; `limit` is 2/λ at the minimum."""
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = _axes(
        figure,
        "How large may a step be?",
        xlabel="learning rate η",
        ylabel="E_total (what lies below 1e-33 is drawn there)",
    )
    for (number, values), colour in zip(curves.items(), _colours(len(curves)), strict=True):
        axes.plot(rates, np.maximum(values, 1e-33), label=f"loss {number}", color=colour, lw=1.3)
    axes.axvline(limit, color=ACCENT, ls="--", lw=1, label=f"2/λ = {limit:.1f}")
    axes.set(xscale="log", yscale="log")
    axes.legend(frameon=False)
    return figure
