"""Exports a trained network for use without this project: python -m src.export [WEIGHTS]; needs the extra `export`.

Writes digits.onnx and digits.pt2 (torch.export), or another data set's name, both from [N, C, H, W] uint8 images, for
MNIST [N, 1, 28, 28], white on black, to [N, classes] log-probabilities, for any N.
"""

import os
from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main
from src.core.errors import UserError

CHECKED = 1000  # images on which each export is compared with PyTorch


@argparse_main
def main() -> None:
    parser = Parser(prog="python -m src.export", description="Exports a trained network to ONNX and torch.export.")
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--root", type=Path, help="the folder of the data; default: as in training")
    parser.add_argument("--output", type=Path, default=Path("outputs/export"), help="folder for the exports")
    arguments = parser.parse_args()

    import logging

    import torch
    from torch import Tensor

    try:
        import onnxruntime
        import onnxscript  # noqa: F401  (torch.onnx needs it)
    except ImportError as error:
        raise UserError(f"{error.name} is missing; pip install -e '.[export]' brings it") from error

    from src.data.datasets import has_mnist
    from src.training.predictor import load_predictor, load_test_data

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    reader = load_predictor(arguments.weights)
    # Contiguous, because torch.export.save warns of weights in channels_last.
    reader.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # Images that are at hand: the graphs must agree on digits, not on noise.
    at_hand = reader.spec.name != "mnist" or has_mnist(arguments.root or Path(os.environ.get("MNIST_ROOT", "data")))
    data = load_test_data(reader, None if at_hand else "digits", arguments.root)
    images, labels = next(data.raw_batches("test"))
    images, labels, name = images[:CHECKED], labels[:CHECKED], data.spec.name

    program = torch.export.export(
        reader, (images[:2],), dynamic_shapes={"images": {0: torch.export.Dim("batch", min=1)}}
    )
    stem = "digits" if reader.spec.label_name == "digit" else reader.spec.name
    onnx_file, program_file = (arguments.output / f"{stem}.{kind}" for kind in ("onnx", "pt2"))
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, program_file)
        torch.onnx.export(
            program,
            f=onnx_file,
            input_names=["images"],
            output_names=["log_probabilities"],
            external_data=False,
            verbose=False,
        )
    except OSError as error:
        raise UserError(f"{arguments.output}: cannot be written ({error.strerror})") from error

    session = onnxruntime.InferenceSession(onnx_file, providers=["CPUExecutionProvider"])
    loaded = torch.export.load(program_file).module()

    def by_onnx(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    with torch.inference_mode():
        expected = reader(images)
        accuracy = (expected.argmax(1) == labels).float().mean()
        print(f"{os.path.relpath(reader.file)}, compared with PyTorch on {len(images):,} test images of {name}")
        width = max(len(str(path)) for path in (onnx_file, program_file))
        print(f"{'PyTorch':<{width}}  accuracy {accuracy:.2%}")
        for path, run in (onnx_file, by_onnx), (program_file, loaded):
            found = torch.cat([run(images[:1]), run(images[1:])])  # two sizes of batch
            difference = (found - expected).abs().max().item()
            of_probabilities = (found.exp() - expected.exp()).abs().max().item()
            accuracy = (found.argmax(1) == labels).float().mean()
            print(
                f"{path!s:<{width}}  accuracy {accuracy:.2%}  maximum difference {difference:.1e} "
                f"(of probabilities {of_probabilities:.1e})"
            )
            assert of_probabilities < 1e-4, f"{path} does not compute what PyTorch does"


if __name__ == "__main__":
    main()
