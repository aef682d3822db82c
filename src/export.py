"""Export a trained network for use without this project: python -m src.export [WEIGHTS]; needs the extra `export`.

Writes digits.onnx and digits.pt2 (torch.export), named after the data set if it is not of digits. Both map any number
of uint8 images, [N, 1, 28, 28] and white on black for MNIST, to [N, classes] log-probabilities.
"""

import logging
from pathlib import Path
from typing import Any

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError


@argparse_main
def main() -> None:
    """Export a trained network to ONNX and torch.export."""
    parser = Parser(prog="python -m src.export", description=main.__doc__)
    parser.add_argument("weights", nargs="?", type=Path, help="run folder, .ckpt, or .pt file; default: shipped")
    parser.add_argument("--output", type=Path, default=Path("outputs/export"), help="folder for the exports")
    arguments = parser.parse_args()

    import torch

    try:
        import onnxruntime  # noqa: F401  (compares the model with PyTorch)
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; type pip install -e '.[export]'") from error
    from src.training.predictor import load_predictor

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    predictor = load_predictor(arguments.weights)
    predictor.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # export warns of channels_last
    images = torch.randint(256, (100, *predictor.spec.shape), dtype=torch.uint8)

    dynamic_shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(predictor, (images[:2],), dynamic_shapes=dynamic_shapes)
    model: Any = torch.onnx.export(program, output_names=["log_probabilities"], verbose=False)
    stem = "digits" if predictor.spec.label_name == "digit" else predictor.spec.name
    onnx_file, program_file = (arguments.output / f"{stem}.{suffix}" for suffix in ("onnx", "pt2"))
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, program_file)
    model.save(onnx_file)
    difference = (model(images)[0] - predictor(images)).abs().max()
    print(f"{program_file}\n{onnx_file}: differs from PyTorch on 100 random images by at most {difference:.1e}")


if __name__ == "__main__":
    main()
