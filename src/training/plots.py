"""Figures of what a network saw and how it did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from src.core.errors import UserError

FEW = 20  # classes that a figure has room to name


def save_figure(figure: Figure, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
        raise UserError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from error


def plot_image_grid(images: Sequence[Tensor], captions: Sequence[str], columns: int = 10) -> Figure:
    """[C, H, W] images, uint8, in rows, each with its caption above."""
    columns = min(columns, len(images))
    longest = max(map(len, captions))
    gap, height, width = 12, *images[0].shape[1:]
    gap = max(gap, round(2.2 * longest) - width)  # pixels, so that captions do not meet
    picture = make_grid(torch.stack(list(images)), nrow=columns, padding=gap, pad_value=255).permute(1, 2, 0).numpy()
    figure = Figure(figsize=(picture.shape[1] / 32, picture.shape[0] / 32))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.imshow(picture, interpolation="nearest")
    axes.axis("off")
    for index, caption in enumerate(captions):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap) + width / 2, gap + row * (height + gap) - 2
        axes.text(x, y, caption, ha="center", fontsize=8)
    return figure


def find_worst_mistakes(labels: Tensor, probabilities: Tensor, count: int = 30) -> Tensor:
    """Indices of the wrongly read images, those first whose true class got the least probability."""
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    wrong = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    return wrong[of_label[wrong].argsort()][:count]


def plot_mistakes(images: Tensor, labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> Figure | None:
    """The worst mistakes among [N, C, H, W] images with the true and the read class; None if there are none."""
    worst = find_worst_mistakes(labels, probabilities)
    if not len(worst):
        return None
    captions = [f"{classes[int(labels[i])]} read as {classes[int(probabilities[i].argmax())]}" for i in worst]
    return plot_image_grid(list(images[worst]), captions, columns=6)


def plot_confusion_matrix(labels: Tensor, probabilities: Tensor, classes: Sequence[str]) -> Figure:
    """How often each class was read as which; with numbers where there is room for them."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # seconds, for this figure alone
    from torchmetrics.utilities.plot import plot_confusion_matrix

    count, few = len(classes), len(classes) <= FEW
    counts = multiclass_confusion_matrix(probabilities, labels, count)
    side = 6.4 if count <= 10 else 9  # small, so that its labels are large
    figure = Figure(figsize=(side, 0.9 * side), layout="constrained")
    axes: Any = figure.add_subplot()
    plot_confusion_matrix(counts, ax=axes, cmap="Blues", labels=[str(name) for name in classes], add_text=few)
    if not few:
        axes.set_xticks([]), axes.set_yticks([])
    short = max(map(len, map(str, classes))) <= 3
    axes.tick_params("x", labelsize=12, rotation=0 if short else 90), axes.tick_params("y", labelsize=12, rotation=0)
    # Beside the diagonal every mistake would look white: let the colours tell mistakes apart.
    axes.images[0].set_clim(0, 2 * max(1, int((counts - counts.diag().diag()).max())))
    return figure
