"""Scores a trained network on the test images: python -m src.evaluate [WEIGHTS]."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.arguments import Parser, entry
from src.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from src.data.sources import Images


def test_images(dataset: str, root: Path) -> "tuple[str, Images]":
    """The name of the data set, which settles auto, and its test images. Raises UserError where they are missing."""
    from src.data.mnist import DigitImages

    data = DigitImages(dataset, str(root), seed=0)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup("test")
    assert data.sets is not None
    return data.sets.name, data.sets.test


def predict_all(net: "nn.Module", images: "Tensor", batch_size: int = 1000) -> "Tensor":
    """[N, 1, 28, 28] uint8 to [N, classes] log-probabilities."""
    import torch

    from src.data.normalize import normalize

    with torch.inference_mode():
        return torch.cat([net(normalize(batch)) for batch in images.split(batch_size)])


def score(log_probabilities: "Tensor", labels: "Tensor") -> dict[str, Any]:
    """Accuracies are fractions, the loss is in nats, the calibration error the expected one over 15 bins."""
    from torch.nn.functional import nll_loss
    from torchmetrics.functional.classification import (
        multiclass_accuracy,
        multiclass_calibration_error,
        multiclass_confusion_matrix,
    )

    from src.pictures import worst_mistakes

    probabilities, classes = log_probabilities.exp(), log_probabilities.shape[1]
    worst = worst_mistakes(labels, probabilities)
    return {
        "images": len(labels),
        "mistakes": int((probabilities.argmax(1) != labels).sum()),
        "accuracy": multiclass_accuracy(probabilities, labels, classes, average="micro").item(),
        "loss": nll_loss(log_probabilities, labels).item(),
        "calibration_error": multiclass_calibration_error(probabilities, labels, classes).item(),
        "accuracy_by_digit": multiclass_accuracy(probabilities, labels, classes, average="none").tolist(),
        "confusion_matrix": multiclass_confusion_matrix(probabilities, labels, classes).tolist(),
        "worst_mistakes": [
            {"index": i, "label": int(labels[i]), "read_as": int(probabilities[i].argmax())} for i in worst.tolist()
        ],
    }


def table(scores: dict[str, Any]) -> str:
    """A row for each digit, and the totals."""
    lines = ["digit  images  mistakes  accuracy  most often read as"]
    for digit, counts in enumerate(scores["confusion_matrix"]):
        wrong = {other: count for other, count in enumerate(counts) if other != digit and count}
        most = max(wrong.values(), default=0)
        taken = ", ".join(str(other) for other, count in wrong.items() if count == most)
        taken += f" ({most} times)" if most > 1 else ""
        accuracy = scores["accuracy_by_digit"][digit]
        lines.append(f"{digit:>5}  {sum(counts):>6}  {sum(wrong.values()):>8}  {accuracy:8.2%}  {taken}".rstrip())
    lines.append(f"  all  {scores['images']:>6}  {scores['mistakes']:>8}  {scores['accuracy']:8.2%}")
    lines.append(f"loss {scores['loss']:.5f}, expected calibration error {scores['calibration_error']:.3%}")
    return "\n".join(lines)


@entry
def main() -> None:
    parser = Parser(prog="python -m src.evaluate", description="Scores a trained network on the test images.")
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--data", choices=["mnist", "digits", "auto"], help="default: what the network was trained on")
    parser.add_argument("--root", type=Path, default=os.environ.get("MNIST_ROOT", "data"), help="has MNIST/raw/")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/evaluation"), help="folder for scores and pictures"
    )
    arguments = parser.parse_args()

    from src.pictures import confusion, mistakes, save
    from src.weights import load

    net, file, dataset = load(arguments.weights)
    name, (images, labels) = test_images(arguments.data or dataset, arguments.root)
    log_probabilities = predict_all(net, images)
    scores = score(log_probabilities, labels)

    folder = arguments.output
    save(confusion(labels, log_probabilities.exp()), folder / "confusion.png")
    worst = mistakes(images[:, 0], labels, log_probabilities.exp())
    if worst:
        save(worst, folder / "mistakes.png")
    file_of_scores = folder / "scores.json"
    try:
        file_of_scores.write_text(json.dumps({"weights": str(file), "data": name, **scores}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{file_of_scores}: {error.strerror}") from error
    print(f"{os.path.relpath(file)} on {name}", table(scores), f"folder {folder}", sep="\n")


if __name__ == "__main__":
    main()
