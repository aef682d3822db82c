"""What all figures share: style, saving, logarithmic axes, and names at the ends of curves. No window opens."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from src.core.errors import UserError

project_style = style.context(Path(__file__).with_suffix(".mplstyle"))  # a decorator for functions that plot


@project_style
def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format of the file's suffix; create the folder. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file)
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise UserError(f"{file}: cannot be written ({error}); name another file") from error


def use_log_scale(axes: Any) -> None:
    """Make the y axis logarithmic, with ticks at powers of ten; over few of these also at 2 and 5 times them."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 500 * low:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())


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
