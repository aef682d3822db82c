"""Reads the digit, or tells the class, of each of some images: python -m src.predict IMAGE...

Exit code 0: every image was read; 1: some could not be; 2: the command was wrong, or none could be read.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src import load
from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError, escape_control_characters

if TYPE_CHECKING:
    from torch import Tensor


BATCH_SIZE = 256
STDIN = Path("-")


def predict_files(reader: "Reader", files: list[Path]) -> Iterator[tuple[dict[str, Any], "Tensor | None"]]:
    """For each file its answer and its [C, H, W] image, or what is wrong with it and None."""
    import torch

    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        seen: list[Tensor | UserError] = []
        for file in batch:
            try:
                seen.append(reader.picture(sys.stdin.buffer.read() if file == STDIN else file))
            except UserError as error:
                seen.append(error)
        images = [image for image in seen if not isinstance(image, UserError)]
        answers = iter(reader.answers(torch.stack(images)) if images else [])
        for file, image in zip(batch, seen, strict=True):
            if isinstance(image, UserError):
                yield {"file": str(file), "error": str(image)}, None
            else:
                yield {"file": str(file), **next(answers)}, image


@argparse_main
def main() -> int:
    parser = Parser(prog="python -m src.predict", description="Tells the class of each image; of digits, as shipped.")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        type=Path,
        help="PNG, JPEG, BMP, GIF, WebP files, folders of them, or - for stdin",
    )
    parser.add_argument("--weights", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--show", type=Path, metavar="PNG", help="write a picture of what the network saw")
    arguments = parser.parse_intermixed_args()

    reader = load(arguments.weights)
    from src.data.preprocess import find_images

    noun, width = reader.spec.label_name, max(5, *map(len, reader.spec.classes))
    files = [file for path in arguments.images for file in find_images(path)]
    results: list[dict[str, Any]] = []
    images: list[Tensor] = []
    for result, image in predict_files(reader, files):
        results.append(result)
        if image is None:
            print(escape_control_characters(f"error: {result['file']}: {result['error']}"), file=sys.stderr)
            continue
        if not images and not arguments.json:
            print(f"{noun:>{width}}  probability  {'runner-up':<{width + 4}}  file")
        images.append(image)
        if not arguments.json:
            answer = f"{result[noun]:>{width}}  {result['probability']:11.2%}"
            second = f"{result['runner_up']!s:<{width - 4}} {result['runner_up_probability']:7.2%}"
            doubt = ["not sure: unlike what it was trained on"] if result["sure"] is False else []
            print(answer, second, escape_control_characters(result["file"]), *doubt, sep="  ")
    if arguments.json:
        print(json.dumps(results, indent=1))
    if arguments.show and images:
        from src.training.plots import plot_image_grid, save_figure

        answers = [result for result in results if "error" not in result]
        save_figure(
            plot_image_grid(images, [f"{answer[noun]}  {answer['probability']:.0%}" for answer in answers]),
            arguments.show,
        )
    return 0 if len(images) == len(results) else 1 if images else 2


if __name__ == "__main__":
    main()
