"""Predict the digit or class of each of some images: python -m src.predict IMAGE...

Exit code 0: every image was read; 1: some could not be read; 2: none could be, or a mistake in the command.
"""

import json
import sys
from pathlib import Path
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError, escape_control_characters
from src.core.process import import_lightning


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
    from src.data.preprocess import SUFFIXES, list_files
    from src.training.predictor import load_predictor

    predictor = load_predictor(arguments.weights)
    files = [file for path in arguments.images for file in (list_files(path, SUFFIXES) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"{arguments.images[0]}: no images in this folder ({', '.join(SUFFIXES)})")
    results: list[dict[str, Any]] = []
    images = []
    for file in files:
        try:
            image = predictor.preprocess_file(sys.stdin.buffer.read() if str(file) == "-" else file)
        except UserError as error:
            print(f"error: {escape_control_characters(file)}: {error}", file=sys.stderr)
        else:
            images.append(image)
            results.append({"file": str(file), **predictor.predict(image[None])[0]})
    label_name, width = predictor.spec.label_name, max(5, *map(len, predictor.spec.classes))
    rows = [f"{label_name:>{width}}  probability  {'runner-up':<{width + 4}}  file"]
    for result in results:
        runner_up = f"{result['runner_up']!s:<{width - 4}} {result['runner_up_probability']:7.2%}"
        doubt = "  not sure: unlike the training images" if result["sure"] is False else ""
        name = escape_control_characters(result["file"]) + doubt
        rows.append(f"{result[label_name]:>{width}}  {result['probability']:11.2%}  {runner_up}  {name}")
    print(json.dumps(results, indent=1) if arguments.json else "\n".join(rows))
    if arguments.show and images:
        from src.core.plots import save_figure
        from src.training.plots import plot_image_grid

        captions = [f"{result[label_name]}  {result['probability']:.0%}" for result in results]
        save_figure(plot_image_grid(images, captions), arguments.show)
    return 0 if len(results) == len(files) else 1 if results else 2


if __name__ == "__main__":
    main()
