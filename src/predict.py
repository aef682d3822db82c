"""Reads the digit in each of some images: python -m src.predict IMAGE...

Exit code 0: every image was read; 1: some could not be; 2: the command was wrong, or none could be read.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.arguments import Parser, entry
from src.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

BATCH_SIZE = 256
STDIN = Path("-")


def predict(net: "nn.Module", images: "Tensor") -> "Tensor":
    """[N, 28, 28] uint8 in MNIST's form to [N, classes] probabilities."""
    import torch

    from src.data.normalize import normalize

    with torch.inference_mode():
        return net(normalize(images.unsqueeze(1))).exp()


def ranking(probabilities: "Tensor") -> dict[str, Any]:
    """The answer in plain values, of one image's probabilities."""
    (first, second), (digit, runner_up) = (top.tolist() for top in probabilities.topk(2))
    return {
        "digit": digit,
        "probability": first,
        "runner_up": runner_up,
        "runner_up_probability": second,
        "probabilities": probabilities.tolist(),
    }


def read_all(net: "nn.Module", files: list[Path]) -> Iterator[tuple[dict[str, Any], "Tensor | None"]]:
    """For each file its answer and its [28, 28] image, or what is wrong with it and None."""
    import torch

    from src.data.files import read_image

    for start in range(0, len(files), BATCH_SIZE):
        batch = files[start : start + BATCH_SIZE]
        seen: list[Tensor | UserError] = []
        for file in batch:
            try:
                seen.append(read_image(sys.stdin.buffer.read() if file == STDIN else file))
            except UserError as error:
                seen.append(error)
        images = [image for image in seen if not isinstance(image, UserError)]
        answers: Iterator[Tensor] = iter(predict(net, torch.stack(images)) if images else [])
        for file, image in zip(batch, seen, strict=True):
            if isinstance(image, UserError):
                yield {"file": str(file), "error": str(image)}, None
            else:
                yield {"file": str(file), **ranking(next(answers))}, image


@entry
def main() -> int:
    parser = Parser(prog="python -m src.predict", description="Reads the digit in each image.")
    parser.add_argument(
        "images",
        metavar="IMAGE",
        nargs="+",
        type=Path,
        help="PNG, JPEG, BMP, GIF files, folders of them, or - for stdin",
    )
    parser.add_argument("--weights", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped")
    parser.add_argument("--json", action="store_true", help="print a JSON list")
    parser.add_argument("--show", type=Path, metavar="PNG", help="write a picture of what the network saw")
    arguments = parser.parse_intermixed_args()

    from src.data.files import find_images
    from src.weights import load

    net = load(arguments.weights).net
    files = [file for path in arguments.images for file in find_images(path)]
    results: list[dict[str, Any]] = []
    images: list[Tensor] = []
    for result, image in read_all(net, files):
        results.append(result)
        if image is None:
            print(f"error: {result['file']}: {result['error']}", file=sys.stderr)
            continue
        if not images and not arguments.json:
            print("digit  probability  runner-up  file")
        images.append(image)
        if not arguments.json:
            print(
                f"{result['digit']:>5}  {result['probability']:11.2%}  "
                f"{result['runner_up']} {result['runner_up_probability']:7.2%}  {result['file']}"
            )
    if arguments.json:
        print(json.dumps(results, indent=1))
    if arguments.show and images:
        from src.pictures import grid, save

        answers = [result for result in results if "error" not in result]
        save(grid(images, [f"{answer['digit']}  {answer['probability']:.0%}" for answer in answers]), arguments.show)
    return 0 if len(images) == len(results) else 1 if images else 2


if __name__ == "__main__":
    main()
