"""What all figures share: style, saving, and names at the ends of curves. No window opens."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure

project_style = style.context(Path(__file__).with_suffix(".mplstyle"))  # a decorator for functions that plot


@project_style
def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format of the file's suffix; create the folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def label_ends(axes: Any) -> None:
    """Write the labels of curves to the right of their ends, each with a line in the colour of its curve."""
    curves = [curve for curve in axes.get_lines() if curve.get_label()[0] != "_" and len(curve.get_xdata())]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the final limits
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    ends = sorted((float(to_fraction(curve.get_xydata()[-1])[1]), number) for number, curve in enumerate(curves))
    if not ends:
        return
    gap = 0.3 / axes.figure.get_figheight()  # of one line of text
    low, span = ends[0][0], max(ends[-1][0] - ends[0][0], gap * (len(ends) - 1))
    for height, (_, number) in zip(np.linspace(0, span, len(ends)) + min(low, 1 - span), ends, strict=True):
        curve = curves[number]
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        line = {"arrowstyle": "-", "color": curve.get_color(), "linewidth": 1.2, "relpos": (0, 0.5)}
        axes.annotate(f" {curve.get_label()}", curve.get_xydata()[-1], arrowprops=line, **place)
