"""Plots of images, mistakes and confusions, as matplotlib figures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from src.core.errors import UserError

MAX_NAMED_CLASSES = 20  # more have no room in a confusion matrix


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure in the format of the file's suffix; create the folder. Raises UserError."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: an unknown suffix
        raise UserError(f"{file}: cannot be written ({error}); name another file") from error


def plot_image_grid(images: Sequence[Tensor], captions: Sequence[str], columns: int = 10) -> Figure:
    """Plot [C, H, W] uint8 images in rows, each below its caption."""
    columns = min(columns, len(images))
    rows, width = math.ceil(len(images) / columns), max(1.2, 0.08 * max(map(len, captions)))  # inches
    figure = Figure(figsize=(width * columns, 1.4 * rows))
    figure.subplots_adjust(0.01, 0.01, 0.99, 1 - 0.2 / rows, hspace=0.3)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        axes: Any = figure.add_subplot(rows, columns, index + 1)
        shown = image[:1] if len(image) == 2 else image  # two channels are no colours
        axes.imshow(shown.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8)
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
    captions = [f"{classes[int(labels[i])]} predicted as {classes[int(predicted[i])]}" for i in worst]
    return plot_image_grid(list(images[worst]), captions, columns=6) if captions else None


def plot_confusion_matrix(labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> Figure:
    """Plot how often each class was predicted as which, with numbers if there are few classes."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # slow to import
    from torchmetrics.utilities.plot import plot_confusion_matrix

    counts = multiclass_confusion_matrix(probabilities, labels, len(classes))
    size, has_room = 6.4 if len(classes) <= 10 else 9, len(classes) <= MAX_NAMED_CLASSES
    figure = Figure(figsize=(size, 0.9 * size), layout="constrained")
    axes: Any = figure.add_subplot()
    plot_confusion_matrix(counts, ax=axes, cmap="Blues", labels=list(classes), add_text=has_room)
    axes.tick_params("x", labelsize=12, rotation=0 if max(map(len, classes)) <= 3 else 90)
    axes.tick_params("y", labelsize=12, rotation=0)
    if not has_room:
        axes.set(xticks=[], yticks=[])
    # Beside the diagonal every mistake would look white: scale the colours by the mistakes.
    axes.images[0].set_clim(0, 2 * max(1, int((counts - counts.diag().diag()).max())))
    return figure
