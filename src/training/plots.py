"""Plots of images, mistakes and confusions, as matplotlib figures."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from src.core.plots import project_style


@project_style
def plot_image_grid(images: Sequence[Tensor], captions: Sequence[str], columns: int = 10, title: str = "") -> Figure:
    """Plot [C, H, W] uint8 images in rows, each below its caption."""
    columns = min(columns, len(images))
    rows, width = math.ceil(len(images) / columns), max(1.2, 0.12 * max(map(len, captions)))  # inches
    figure = Figure(figsize=(width * columns, 1.5 * rows + 0.4 * bool(title)))
    figure.suptitle(title)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes: Any = figure.add_subplot(rows, columns, index + 1)
        shown = image[:1] if len(image) == 2 else image  # two channels are no colours
        axes.imshow(shown.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption)
        axes.axis("off")
    return figure


def find_worst_mistakes(labels: Tensor, probabilities: Tensor, count: int = 30) -> Tensor:
    """Return the indices of mistakes, the lowest probability of the true class first."""
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    mistakes = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    return mistakes[of_label[mistakes].argsort()][:count]


def plot_mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> Figure | None:
    """Plot the worst mistakes among [N, C, H, W] uint8 images; None if there are none."""
    worst, predicted = find_worst_mistakes(labels, probabilities), probabilities.argmax(1)
    captions = [f"{classes[int(labels[i])]} → {classes[int(predicted[i])]}" for i in worst]
    title = "Worst mistakes: true class → predicted class"
    return plot_image_grid(list(images[worst]), captions, 6, title) if captions else None


@project_style
def plot_confusion_matrix(labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> Figure:
    """Plot how often each class was predicted as which, with numbers if there are at most 20 classes."""
    from sklearn.metrics import ConfusionMatrixDisplay, confusion_matrix  # slow to import

    counts, is_small = confusion_matrix(labels, probabilities.argmax(1), labels=range(len(classes))), len(classes) <= 20
    # Beside the diagonal every mistake would look white: scale the colours by the mistakes.
    mistakes = counts - np.diag(counts.diagonal())
    options: Any = {"cmap": "Blues", "colorbar": False, "include_values": is_small, "xticks_rotation": "vertical"}
    figure = Figure(figsize=(9, 8))
    display = ConfusionMatrixDisplay(counts, display_labels=classes if is_small else None)
    axes: Any = figure.add_subplot()
    axes.grid(False)
    display.plot(ax=axes, im_kw={"vmax": 2 * max(1, mistakes.max())}, **options)
    return figure
