"""Test any run again, or fit the OOD detector of a classifier of images: python -m src.evaluate [WEIGHTS]."""

import json
import os
from pathlib import Path
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import format_metric
from src.core.process import import_lightning


def fit_ood(predictor: Any, data: Any) -> None:
    """Fit the OOD detector on the training images, save it beside the weights, and check it on the test images."""
    import torch

    from src.models.ood import fit_ood_detector

    def normalize(split: str) -> Any:
        return ((predictor.spec.normalize(images), labels) for images, labels in data.raw_batches(split))

    detector = fit_ood_detector(predictor.net, normalize("train"))
    is_flagged = torch.cat([detector.detect(predictor.net, images) for images, _ in normalize("test")])
    torch.save(detector._asdict(), predictor.ood_file)
    flagged = f"flags {is_flagged.float().mean():.2%} of {len(is_flagged):,} test images as out-of-distribution"
    print(f"{os.path.relpath(predictor.ood_file)}: {flagged}")


def score_images(predictor: Any, data: Any, folder: Path) -> tuple[dict[str, Any], str]:
    """Score the test images; plot the confusion matrix and the worst mistakes. Return the scores and their text."""
    import numpy as np
    import torch
    from sklearn.metrics import classification_report
    from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

    from src.core.plots import save_figure
    from src.training.plots import find_worst_mistakes, plot_confusion_matrix, plot_mistakes

    with torch.inference_mode():
        parts = [(images, labels, predictor(images)) for images, labels in data.raw_batches("test")]
    images, labels, log_probabilities = (torch.cat(part) for part in zip(*parts, strict=True))
    probabilities, predicted, classes = log_probabilities.exp(), log_probabilities.argmax(1), predictor.spec.classes
    save_figure(plot_confusion_matrix(labels, probabilities, classes), folder / "confusion.png")
    if figure := plot_mistakes(images, labels, probabilities, classes):
        save_figure(figure, folder / "mistakes.png")

    def report(**options: Any) -> Any:
        names = {"labels": range(len(classes)), "target_names": classes, "zero_division": 0}
        return classification_report(labels.numpy(), predicted.numpy(), **names, **options)

    metrics = {name: metric(probabilities, labels).tolist() for name, metric in predictor.metrics.items()}
    scores = {
        "data": data.spec.name,
        "images": len(labels),
        "mistakes": int((predicted != labels).sum()),
        "accuracy": (predicted == labels).float().mean().item(),
        "loss": torch.nn.functional.nll_loss(log_probabilities, labels).item(),
        "calibration_error": multiclass_calibration_error(probabilities, labels, len(classes)).item(),
        **metrics,
        "report": report(output_dict=True),
        "confusion_matrix": multiclass_confusion_matrix(probabilities, labels, len(classes)).tolist(),
        "worst_mistakes": [
            {"index": i, "label": int(labels[i]), "predicted_as": int(predicted[i])}
            for i in find_worst_mistakes(labels, probabilities).tolist()
        ],
    }
    totals = "{mistakes:,} mistakes in {images:,} images: accuracy {accuracy:.2%}, loss {loss:.5f}".format(**scores)
    lines = [report(digits=4), f"{totals}, expected calibration error {scores['calibration_error']:.3%}"]
    return scores, "\n".join([*lines, *(f"{name} {np.round(value, 4)}" for name, value in metrics.items())])


def run_test(module: Any, root: Path | None) -> tuple[dict[str, Any], str]:
    """Run the test of a LightningModule on the data of its training. Return the scores and their text."""
    import lightning as L

    from src.training.console import silence_routine_output
    from src.training.instantiate import RUN_CONFIG, instantiate_node

    silence_routine_output()
    L.seed_everything(0, verbose=False)  # a test may draw random numbers
    data = instantiate_node("data", module.hparams[RUN_CONFIG]["data"] | ({"root": str(root)} if root else {}))
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(devices=1, **quiet)
    trainer.test(module, data, verbose=False)
    scores = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
    text = "\n".join(f"{name}  {format_metric(name, value, digits=4)}" for name, value in scores.items())
    return {"data": type(data).__name__, **scores}, text


def choose_folder(file: Path, data_name: str, root: Path | None = None) -> Path:
    """Return the folder of the results, one per weights file and data set: below the run folder if it has one."""
    data_name += f"_{root.resolve().parent.name}" if root else ""  # pets_a for a/pets
    is_in_run = file.parent.name == "checkpoints" and (file.parents[1] / ".hydra").is_dir()
    parent = file.parents[1] / "evaluation" if is_in_run else Path("outputs/evaluation")
    return parent / f"{file.stem}_{data_name}"


@argparse_main
def main() -> None:
    """Test a trained network: score the test images, or run the test of any other task."""
    parser = Parser(prog="python -m src.evaluate", description=main.__doc__)
    parser.add_argument("weights", nargs="?", type=Path, help="run folder, .ckpt, or .pt file; default: shipped")
    parser.add_argument("--best", action="store_true", help="the best checkpoint of a run folder, not the last")
    parser.add_argument("--data", help="a config of conf/data; default: that of the training")
    parser.add_argument("--root", type=Path, help="folder of the data; default: as in training")
    output_help = "folder for scores and plots; default: below the run folder, or below outputs/evaluation"
    parser.add_argument("--output", type=Path, help=output_help)
    parser.add_argument("--fit-ood", action="store_true", help='fit what makes predict and draw say "not sure"')
    arguments = parser.parse_args()

    import_lightning()
    from src.training.predictor import Predictor, find_weights_file, load, load_predictor, load_test_data

    file = find_weights_file(arguments.weights, arguments.best)
    if arguments.fit_ood or arguments.data:  # only for classifiers of images
        predictor = load_predictor(file, use_ood=False)
    else:
        predictor = load(file, use_ood=False)
    if isinstance(predictor, Predictor):
        data = load_test_data(predictor, arguments.data, arguments.root)
        if arguments.fit_ood:
            return fit_ood(predictor, data)
        folder = arguments.output or choose_folder(file, data.spec.name, arguments.root)
        scores, text = score_images(predictor, data, folder)
    else:
        scores, text = run_test(predictor, arguments.root)
        folder = arguments.output or choose_folder(file, scores["data"], arguments.root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"weights": str(file), **scores}, indent=1) + "\n", encoding="utf-8")
    print(f"{os.path.relpath(file)} on {scores['data']}", text, f"folder {folder}", sep="\n")


if __name__ == "__main__":
    main()
