"""Figures of what a network saw and how it did."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torchvision.utils import make_grid

from src.errors import UserError


def save(figure: Figure, file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=100)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not write
        raise UserError(f"{file}: cannot be written ({str(error).splitlines()[0]})") from error


def grid(images: Sequence[Tensor], captions: Sequence[str], columns: int = 10) -> Figure:
    """[28, 28] images in rows, each with its caption above."""
    columns = min(columns, len(images))
    gap, height, width = 12, *images[0].shape
    picture = make_grid(torch.stack(list(images))[:, None], nrow=columns, padding=gap, pad_value=255)[0].numpy()
    figure = Figure(figsize=(picture.shape[1] / 32, picture.shape[0] / 32))
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.imshow(picture, cmap="gray", interpolation="nearest")
    axes.axis("off")
    for index, caption in enumerate(captions):
        row, column = divmod(index, columns)
        x, y = gap + column * (width + gap) + width / 2, gap + row * (height + gap) - 2
        axes.text(x, y, caption, ha="center", fontsize=8)
    return figure


def worst_mistakes(labels: Tensor, probabilities: Tensor, count: int = 30) -> Tensor:
    """Indices of the wrongly read images, those first whose true digit got the least probability."""
    of_label = probabilities.gather(1, labels[:, None])[:, 0]
    wrong = (probabilities.argmax(1) != labels).nonzero()[:, 0]
    return wrong[of_label[wrong].argsort()][:count]


def mistakes(images: Tensor, labels: Tensor, probabilities: Tensor) -> Figure | None:
    """The worst mistakes among [N, 28, 28] images with the true and the read digit; None if there are none."""
    worst = worst_mistakes(labels, probabilities)
    if not len(worst):
        return None
    captions = [f"{labels[i]} read as {probabilities[i].argmax()}" for i in worst]
    return grid(list(images[worst]), captions, columns=6)


def confusion(labels: Tensor, probabilities: Tensor) -> Figure:
    """How often each digit was read as which."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix  # seconds, for this figure alone
    from torchmetrics.utilities.plot import plot_confusion_matrix

    counts = multiclass_confusion_matrix(probabilities, labels, probabilities.shape[1])
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes: Any = figure.add_subplot()
    plot_confusion_matrix(counts, ax=axes, cmap="Blues")
    # Beside the diagonal every mistake would look white: let the colours tell mistakes apart.
    axes.images[0].set_clim(0, 2 * max(1, int((counts - counts.diag().diag()).max())))
    return figure
