"""Plot losses. Only Matplotlib's figure objects are used, so no window opens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, style
from matplotlib.figure import Figure

TITLE = "Variation of losses w.r.t. learning rate"
STYLE = Path(__file__).parents[1] / "core/plots.mplstyle"


def save_figure(figure: Figure, file: Path) -> None:
    """Save a PNG without the software's name, so that equal figures are equal files."""
    figure.savefig(file, dpi=150, metadata={"Software": None})


@style.context(STYLE)
def plot_curves(
    curves: dict[str, Any], x: Any = None, title: str = TITLE, scales: Sequence[str] = ("linear", "log"), **labels: str
) -> Figure:
    """Plot one curve per name, in one panel per scale of the y axis; `x` counts from 1 by default."""
    figure = Figure(figsize=(3.5 + 4 * len(scales), 4.5))
    figure.suptitle(title)
    colors = colormaps["viridis"](np.linspace(0, 0.85, len(curves)))
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        axes.set(**{"xlabel": "loss number", "ylabel": "E_total", "yscale": scale} | labels)
        for (name, values), color in zip(curves.items(), colors, strict=True):
            axes.plot(range(1, len(values) + 1) if x is None else x, values, label=name, color=color)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure
