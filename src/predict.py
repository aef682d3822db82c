"""Predict the digit or class of each of some images: python -m src.predict IMAGE...

Exit code 0: every image was read; 1: some could not be read; 2: none could be, or a mistake in the command.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError, escape_control_characters
from src.core.process import import_lightning

BATCH_SIZE = 256


def predict_files(predictor: Any, files: list[Path]) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield for each file its prediction and its [C, H, W] image, or its error and None."""
    import torch

    for start in range(0, len(files), BATCH_SIZE):
        batch, images, failures = files[start : start + BATCH_SIZE], [], {}
        for index, file in enumerate(batch):
            try:
                images.append(predictor.preprocess_file(sys.stdin.buffer.read() if str(file) == "-" else file))
            except UserError as error:
                failures[index] = {"error": str(error)}
        predictions = zip(predictor.predict(torch.stack(images)) if images else [], images, strict=True)
        for index, file in enumerate(batch):
            result, image = (failures[index], None) if index in failures else next(predictions)
            yield {"file": str(file), **result}, image


@argparse_main
def main() -> int:
    """Predict the digit or class of each image."""
    parser = Parser(prog="python -m src.predict", description=main.__doc__)
    images_help = "PNG, JPEG, BMP, GIF, WebP or TIFF files, folders of them, or - for stdin"
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help=images_help)
    parser.add_argument("--weights", type=Path, help="run folder, .ckpt, or .pt file; default: shipped")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--show", type=Path, metavar="PNG", help="plot the images as the network receives them")
    arguments = parser.parse_intermixed_args()

    import_lightning()
    from src.data.preprocess import find_images
    from src.training.predictor import load_predictor

    predictor = load_predictor(arguments.weights)

    label_name, width = predictor.spec.label_name, max(5, *map(len, predictor.spec.classes))
    files = [file for path in arguments.images for file in find_images(path)]
    results, images, captions = [], [], []
    if not arguments.json:
        print(f"{label_name:>{width}}  probability  {'runner-up':<{width + 4}}  file")
    for result, image in predict_files(predictor, files):
        results.append(result)
        name = escape_control_characters(result["file"])
        if image is None:
            print(f"error: {name}: {result['error']}", file=sys.stderr)
            continue
        images.append(image)
        captions.append(f"{result[label_name]}  {result['probability']:.0%}")
        if not arguments.json:
            runner_up = f"{result['runner_up']!s:<{width - 4}} {result['runner_up_probability']:7.2%}"
            doubt = "  not sure: unlike the training images" if result["sure"] is False else ""
            print(f"{result[label_name]:>{width}}  {result['probability']:11.2%}  {runner_up}  {name}{doubt}")
    if arguments.json:
        print(json.dumps(results, indent=1))
    if arguments.show and images:
        from src.training.plots import plot_image_grid, save_figure

        save_figure(plot_image_grid(images, captions), arguments.show)
    return 0 if len(images) == len(results) else 1 if images else 2


if __name__ == "__main__":
    main()
