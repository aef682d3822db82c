"""Measures what a network knows, so that predict and draw say "not sure" of all else: python -m src.familiar [WEIGHTS].

Written beside the weights; the limit is set on the images of training, the test images say how often it is wrong.
"""

import os
from pathlib import Path

from src import load
from src.cli.argparse_main import Parser, argparse_main


@argparse_main
def main() -> None:
    parser = Parser(prog="python -m src.familiar", description='Lets predict and draw say "not sure".')
    parser.add_argument(
        "weights", nargs="?", type=Path, help="a run folder, a .ckpt of one, or a .pt file; default: as shipped"
    )
    parser.add_argument("--root", type=Path, help="the folder of the data; default: as in training")
    arguments = parser.parse_args()

    reader = load(arguments.weights, familiar=False)  # it may be damaged
    import torch

    from src.models.ood import fit_ood_detector
    from src.training.predictor import get_ood_file, load_test_data

    data = load_test_data(reader, root=arguments.root)
    known, test = (
        ((reader.spec.normalize(images), labels) for images, labels in batches)
        for batches in (data.raw_batches("train"), data.raw_batches("test"))
    )
    familiar = fit_ood_detector(reader.net, known)
    alarms = torch.cat([familiar.distances(reader.net, images) > familiar.limit for images, _ in test])
    torch.save(familiar._asdict(), get_ood_file(reader.file))
    share = alarms.float().mean()
    print(f"{os.path.relpath(get_ood_file(reader.file))}: not sure of {share:.2%} of {len(alarms):,} test images")


if __name__ == "__main__":
    main()
