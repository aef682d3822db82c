"""Export a trained network for use without this project: python -m src.export [WEIGHTS]; needs the extra `export`.

Writes digits.onnx and digits.pt2 (torch.export), named after the data set if it is not of digits. Both map any number
of uint8 images, [N, 1, 28, 28] and white on black for MNIST, to [N, classes] log-probabilities.
"""

import logging
import os
from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError


@argparse_main
def main() -> None:
    """Export a trained network to ONNX and torch.export."""
    parser = Parser(prog="python -m src.export", description=main.__doc__)
    parser.add_argument("weights", nargs="?", type=Path, help="run folder, .ckpt, or .pt file; default: shipped")
    parser.add_argument("--root", type=Path, help="folder of the data; default: as in training")
    parser.add_argument("--output", type=Path, default=Path("outputs/export"), help="folder for the exports")
    arguments = parser.parse_args()

    import torch

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; type pip install -e '.[export]'") from error
    from src.data.datasets import has_mnist
    from src.training.predictor import load_predictor, load_test_data

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    predictor = load_predictor(arguments.weights, use_ood=False)
    predictor.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # export warns of channels_last
    # Without MNIST the exports are compared on the bundled digits.
    root = arguments.root or Path(os.environ.get("MNIST_ROOT", "data"))
    choice = "digits" if predictor.spec.name == "mnist" and not has_mnist(root) else None
    try:
        data = load_test_data(predictor, choice, arguments.root)
    except UserError as error:
        raise UserError(f"{error} (the exports are compared with PyTorch on its test images)") from error
    images, labels = (tensor[:1000] for tensor in next(data.raw_batches("test")))

    dynamic_shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    try:
        program = torch.export.export(predictor, (images[:2],), dynamic_shapes=dynamic_shapes)
    except Exception as error:  # torch.export raises errors of many types
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{type(predictor.net).__name__} cannot be exported by torch.export ({reason})") from error
    stem = "digits" if predictor.spec.label_name == "digit" else data.spec.name
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

    exported = torch.export.load(program_file).module()
    print(f"{len(images):,} test images of {data.spec.name}, differences from PyTorch:")
    with torch.inference_mode():
        expected = predictor(images)
        for name, run in (os.path.relpath(predictor.file), predictor), (onnx_file, run_onnx), (program_file, exported):
            outputs = torch.cat([run(images[:1]), run(images[1:])])  # two batch sizes
            accuracy, difference = (outputs.argmax(1) == labels).float().mean(), (outputs - expected).abs().max()
            of_probabilities = (outputs.exp() - expected.exp()).abs().max()
            differences = f"maximum difference {difference:.1e} (of probabilities {of_probabilities:.1e})"
            print(f"{name}  accuracy {accuracy:.2%}  {differences}")
            assert of_probabilities < 1e-4, f"{name} does not compute what PyTorch does"


if __name__ == "__main__":
    main()
