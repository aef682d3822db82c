"""What all figures share: style, saving, and names at the ends of curves. No window opens."""

from pathlib import Path
from typing import Any

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
    gap, heights = 0.3 / axes.figure.get_figheight(), [ends[0][0]]  # the gap is that of one line of text
    for height, _ in ends[1:]:
        heights.append(max(height, heights[-1] + gap))
    excess = max(0, heights[-1] - 1)
    for height, (_, number) in zip(heights, ends, strict=True):
        curve = curves[number]
        place: Any = {"xytext": (1.03, height - excess), "textcoords": "axes fraction", "va": "center"}
        line = {"arrowstyle": "-", "color": curve.get_color(), "linewidth": 1.2, "relpos": (0, 0.5)}
        axes.annotate(f" {curve.get_label()}", curve.get_xydata()[-1], arrowprops=line, annotation_clip=False, **place)
