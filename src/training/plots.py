"""Plots of images, mistakes and confusions, as matplotlib figures."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from src.core.plots import project_style

MAX_NAMED_CLASSES = 20  # more have no room in a confusion matrix


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
    """Plot how often each class was predicted as which, with numbers if there are few classes."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import
    from torchmetrics.utilities.plot import plot_confusion_matrix

    counts = multiclass_confusion_matrix(probabilities, labels, len(classes))
    size, has_room = 7 if len(classes) <= 10 else 9, len(classes) <= MAX_NAMED_CLASSES
    figure = Figure(figsize=(size, 0.9 * size))
    axes: Any = figure.add_subplot()
    plot_confusion_matrix(counts, ax=axes, cmap="Blues", labels=list(classes), add_text=has_room)
    for text in axes.texts:
        text.set(fontsize=11, visible=text.get_text() != "0")
    axes.tick_params("x", labelsize=12, rotation=0 if max(map(len, classes)) <= 3 else 90)
    axes.tick_params("y", labelsize=12, rotation=0)
    axes.grid(False)
    if not has_room:
        axes.set(xticks=[], yticks=[])
    # Beside the diagonal every mistake would look white: scale the colours by the mistakes.
    axes.images[0].set_clim(0, 2 * max(1, int((counts - counts.diag().diag()).max())))
    return figure
