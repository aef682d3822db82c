"""What all figures share: style, saving, logarithmic axes, and names at the ends of curves. No window opens."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.colors import to_rgb
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


def use_log_scale(axes: Any, name: str) -> None:
    """Make the x or y axis logarithmic, with ticks at powers of ten; over few of these also at 2 and 5 times them."""
    axes.set(**{f"{name}scale": "log"})
    low, high = getattr(axes, f"get_{name}lim")()
    if high < 500 * low:
        axis = getattr(axes, f"{name}axis")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def label_ends(axes: Any) -> None:
    """Write the label of each curve to the right of its end, in its colour; move labels apart that would overlap."""
    curves = [curve for curve in axes.get_lines() if curve.get_label()[0] != "_" and len(curve.get_xdata())]
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())  # the final limits
    to_fraction = (axes.transData + axes.transAxes.inverted()).transform
    heights = [float(to_fraction(curve.get_xydata()[-1])[1]) for curve in curves]
    order = sorted(range(len(curves)), key=heights.__getitem__)
    gap = 0.3 / axes.figure.get_figheight()  # of one line of text
    for lower, upper in pairwise(order):
        heights[upper] = max(heights[upper], heights[lower] + gap)
    if order and (excess := heights[order[-1]] - 1) > 0:
        heights = [height - excess for height in heights]
    for curve, height in zip(curves, heights, strict=True):
        color = np.array(to_rgb(curve.get_color()))
        luminance = float(color**2.2 @ (0.2126, 0.7152, 0.0722))
        text_color = color * (0.175 / max(0.175, luminance)) ** (1 / 2.2)  # a contrast of 4.5 or more on white
        place = {"xytext": (1.03, height), "textcoords": "axes fraction", "va": "center", "annotation_clip": False}
        line = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "relpos": (0, 0.5)}
        axes.annotate(f" {curve.get_label()}", curve.get_xydata()[-1], color=text_color, arrowprops=line, **place)
