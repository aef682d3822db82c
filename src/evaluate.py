"""Scores a trained network on the test images: python -m src.evaluate [WEIGHTS]."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import load
from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def predict_all(reader: "Reader", data: Any) -> "tuple[Tensor, Tensor, Tensor]":
    """Of all test images: [N, C, H, W] pixels, [N] labels, [N, classes] log-probabilities."""
    import torch

    parts = []
    with torch.inference_mode():
        for images, labels in data.raw_batches("test"):  # the network normalises them
            parts.append((images, labels, reader(images)))
    images, labels, log_probabilities = (torch.cat(part) for part in zip(*parts, strict=True))
    return images, labels, log_probabilities


def compute_scores(log_probabilities: "Tensor", labels: "Tensor") -> dict[str, Any]:
    """Accuracies are fractions, the loss is in nats, the calibration error the expected one over 15 bins."""
    from torch.nn.functional import nll_loss
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    from src.training.plots import find_worst_mistakes

    probabilities, classes = log_probabilities.exp(), log_probabilities.shape[1]
    worst = find_worst_mistakes(labels, probabilities)
    return {
        "images": len(labels),
        "mistakes": int((probabilities.argmax(1) != labels).sum()),
        "accuracy": multiclass_accuracy(probabilities, labels, classes, average="micro").item(),
        "loss": nll_loss(log_probabilities, labels).item(),
        "calibration_error": multiclass_calibration_error(probabilities, labels, classes).item(),
        "accuracy_by_class": multiclass_accuracy(probabilities, labels, classes, average="none").tolist(),
        "confusion_matrix": multiclass_confusion_matrix(probabilities, labels, classes).tolist(),
        "worst_mistakes": [
            {"index": i, "label": int(labels[i]), "read_as": int(probabilities[i].argmax())} for i in worst.tolist()
        ],
    }


def format_scores(scores: dict[str, Any], noun: str = "digit", classes: Sequence[str] = tuple("0123456789")) -> str:
    """A row for each class, and the totals."""
    width = max(5, *map(len, classes))
    lines = [f"{noun:>{width}}  images  mistakes  accuracy  most often read as"]
    for label, counts in enumerate(scores["confusion_matrix"]):
        wrong = {other: count for other, count in enumerate(counts) if other != label and count}
        most = max(wrong.values(), default=0)
        taken = ", ".join(classes[other] for other, count in wrong.items() if count == most)
        taken += f" ({most} times)" if most > 1 else ""
        accuracy = scores["accuracy_by_class"][label]
        lines.append(
            f"{classes[label]:>{width}}  {sum(counts):>6}  {sum(wrong.values()):>8}  {accuracy:8.2%}  {taken}".rstrip()
        )
    lines.append(f"{'all':>{width}}  {scores['images']:>6}  {scores['mistakes']:>8}  {scores['accuracy']:8.2%}")
    lines.append(f"loss {scores['loss']:.5f}, expected calibration error {scores['calibration_error']:.3%}")
    return "\n".join(lines)


@argparse_main
def main() -> None:
    parser = Parser(prog="python -m src.evaluate", description="Scores a trained network on the test images.")
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--data", help="one of conf/data; default: what the network was trained on")
    parser.add_argument("--root", type=Path, help="the folder of the data; default: as in training")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/evaluation"), help="folder for scores and pictures"
    )
    arguments = parser.parse_args()

    reader = load(arguments.weights)
    from src.training.plots import plot_confusion_matrix, plot_mistakes, save_figure
    from src.training.predictor import load_test_data

    data = load_test_data(reader, arguments.data, arguments.root)
    images, labels, log_probabilities = predict_all(reader, data)
    classes = reader.spec.classes
    scores = compute_scores(log_probabilities, labels)

    folder = arguments.output
    save_figure(plot_confusion_matrix(labels, log_probabilities.exp(), classes), folder / "confusion.png")
    worst = plot_mistakes(images, labels, log_probabilities.exp(), classes)
    if worst:
        save_figure(worst, folder / "mistakes.png")
    file_of_scores = folder / "scores.json"
    try:
        file_of_scores.write_text(
            json.dumps({"weights": str(reader.file), "data": data.spec.name, **scores}, indent=1) + "\n"
        )
    except OSError as error:
        raise UserError(f"{file_of_scores}: {error.strerror}") from error
    print(
        f"{os.path.relpath(reader.file)} on {data.spec.name}",
        format_scores(scores, reader.spec.label_name, classes),
        f"folder {folder}",
        sep="\n",
    )


if __name__ == "__main__":
    main()
