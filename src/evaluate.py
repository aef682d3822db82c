"""Test any run again, or fit the OOD detector of a classifier of images: python -m src.evaluate [WEIGHTS]."""

import json
import os
from pathlib import Path
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
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


def score_images(predictor: Any, data: Any, folder: Path) -> dict[str, Any]:
    """Score the test images, print the scores of each class, plot the confusion matrix and the worst mistakes."""
    import torch
    from sklearn.metrics import classification_report
    from torchmetrics.functional.classification import multiclass_calibration_error

    from src.core.plots import save_figure
    from src.training.plots import plot_confusion_matrix, plot_mistakes

    with torch.inference_mode():
        parts = [(images, labels, predictor(images)) for images, labels in data.raw_batches("test")]
    images, labels, log_probabilities = (torch.cat(part) for part in zip(*parts, strict=True))
    probabilities, predicted, classes = log_probabilities.exp(), log_probabilities.argmax(1), predictor.spec.classes
    save_figure(plot_confusion_matrix(labels, probabilities, classes), folder / "confusion.png")
    if figure := plot_mistakes(images, labels, probabilities, classes):
        save_figure(figure, folder / "mistakes.png")
    names: Any = {"labels": range(len(classes)), "target_names": classes, "zero_division": 0}
    print(classification_report(labels.numpy(), predicted.numpy(), digits=4, **names))
    return {
        "data": data.spec.name,
        "images": len(labels),
        "mistakes": int((predicted != labels).sum()),
        "accuracy": (predicted == labels).float().mean().item(),
        "loss": torch.nn.functional.nll_loss(log_probabilities, labels).item(),
        "calibration_error": multiclass_calibration_error(probabilities, labels, len(classes)).item(),
        **{name: metric(probabilities, labels).tolist() for name, metric in predictor.metrics.items()},
        "report": classification_report(labels.numpy(), predicted.numpy(), output_dict=True, **names),
    }


def run_test(module: Any, root: Path | None) -> dict[str, Any]:
    """Run the test of a LightningModule on the data of its training; return its scores."""
    import lightning as L

    from src.training.console import silence_routine_output
    from src.training.instantiate import RUN_CONFIG, instantiate_node

    silence_routine_output()
    L.seed_everything(0, verbose=False)  # a test may draw random numbers
    data = instantiate_node("data", module.hparams[RUN_CONFIG]["data"] | ({"root": str(root)} if root else {}))
    quiet: Any = dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False)
    trainer = L.Trainer(devices=1, **quiet)
    trainer.test(module, data, verbose=False)
    return {"data": type(data).__name__, **{name: float(x) for name, x in sorted(trainer.callback_metrics.items())}}


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
    from src.training.checkpoints import find_checkpoint
    from src.training.predictor import SHIPPED_WEIGHTS, Predictor, load, load_predictor, load_test_data

    file = find_checkpoint(arguments.weights or SHIPPED_WEIGHTS, arguments.best)
    parent = file.parents[1] / "evaluation" if file.parent.name == "checkpoints" else Path("outputs/evaluation")
    folder = arguments.output or parent / "_".join(filter(None, [file.stem, arguments.data]))
    model = load_predictor(file) if arguments.fit_ood or arguments.data else load(file)
    if isinstance(model, Predictor):
        data = load_test_data(model, arguments.data, arguments.root)
        if arguments.fit_ood:
            return fit_ood(model, data)
        scores = score_images(model, data, folder)
    else:
        scores = run_test(model, arguments.root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.json").write_text(json.dumps({"weights": str(file), **scores}, indent=1) + "\n", encoding="utf-8")
    scores.pop("report", None)  # printed already
    for name, value in ({"weights": os.path.relpath(file)} | scores | {"folder": folder}).items():
        print(f"{name}  {value:.5g}" if isinstance(value, float) else f"{name}  {value}")


if __name__ == "__main__":
    main()
