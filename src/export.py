"""Export a trained network for use without this project: python -m src.export [WEIGHTS]; needs the extra `export`.

Writes digits.onnx and digits.pt2 (torch.export), named after the data set if it is not of digits. Both map any number
of uint8 images, [N, 1, 28, 28] and white on black for MNIST, to [N, classes] log-probabilities.
"""

import logging
from pathlib import Path

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
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; type pip install -e '.[export]'") from error
    from src.training.predictor import load_predictor

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    predictor = load_predictor(arguments.weights, use_ood=False)
    predictor.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # export warns of channels_last
    images = torch.randint(256, (100, *predictor.spec.shape), dtype=torch.uint8)

    dynamic_shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    try:
        program = torch.export.export(predictor, (images[:2],), dynamic_shapes=dynamic_shapes)
    except Exception as error:  # torch.export raises errors of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{type(predictor.net).__name__} cannot be exported by torch.export ({reason})") from error
    stem = "digits" if predictor.spec.label_name == "digit" else predictor.spec.name
    onnx_file, program_file = (arguments.output / f"{stem}.{suffix}" for suffix in ("onnx", "pt2"))
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {arguments.output}: {error.strerror}; choose another folder") from error
    torch.export.save(program, program_file)
    torch.onnx.export(program, f=onnx_file, output_names=["log_probabilities"], external_data=False, verbose=False)

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])

    def run_onnx(batch: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {"images": batch.numpy()})[0])

    print(f"largest difference from PyTorch's log-probabilities of {len(images)} random images:")
    with torch.inference_mode():
        expected = predictor(images)
        for file, run in (onnx_file, run_onnx), (program_file, torch.export.load(program_file).module()):
            outputs = torch.cat([run(images[:1]), run(images[1:])])  # two batch sizes
            difference = (outputs - expected).abs().max().item()
            print(f"{file}  {difference:.1e}")
            assert difference < 1e-3, f"{file} does not compute what PyTorch does"


if __name__ == "__main__":
    main()
