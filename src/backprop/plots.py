"""Plot losses of the 2-2-2 network."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from src.core.plots import label_ends, project_style, use_log_scale

TITLE = "Variation of losses w.r.t. learning rate"


@project_style
def plot_curves(
    curves: dict[str, Any], x: Any = None, title: str = TITLE, scales: Sequence[str] = ("linear", "log"), **labels: str
) -> Figure:
    """Plot one curve per name, in one panel per scale of the y axis; `x` counts from 1 by default."""
    figure = Figure(figsize=(2 + 4.5 * len(scales), 4.5))
    figure.suptitle(title)
    colors = colormaps["viridis"](np.linspace(0, 0.65, len(curves)))
    for axes, scale in zip(figure.subplots(1, len(scales), squeeze=False)[0], scales, strict=True):
        for (name, values), color in zip(curves.items(), colors, strict=True):
            axes.plot(range(1, len(values) + 1) if x is None else x, values, label=name, color=color)
        axes.set(**{"xlabel": "loss number", "ylabel": "E_total"} | labels)
        if scale == "log":
            use_log_scale(axes, "y")
    if x is None:
        label_ends(axes)
    else:  # curves that need not end apart
        figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure
