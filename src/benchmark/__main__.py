"""Speed of training, as ratios of runs made alternately: python -m src.benchmark [key=value ...]

a  a bare PyTorch loop over the same data in memory, with the same network, augmentation and optimizer: the limit
b  python -m src.train: the same through Lightning, with its logging
c  the source's pipeline: torchvision's transforms image by image in a DataLoader, and the default memory layout

They take turns every few batches, so that a noisy machine is noisy for all of them: while b trains, its run is held
up for as many batches of a, then of c. The ratios are those of the sums of the times, which have b's work at the ends
of its epochs in them; the standard error comes from the rounds.

--time-to 99.4 is the longer mode: `experiment=fast`, or the one named, is trained to its end with several seeds, whose
mean should have so many percent of the test images right, then c with the source's recipe until it first has, scored
after each epoch; scoring is not timed. With `experiment=distilled` each seed asks the teachers anew, and is timed with it.

--side-by-side starts whole runs, one and then two at once, with the cores divided among them, as they do by themselves,
and with a thread on every core for each: images per second of the training, together.

On a GPU (trainer.accelerator=gpu) all of these come in one go, of less than eight minutes, each with and without
trainer=cuda_graph: the ratios, batches of 64 to 2048, short recipes with ten seeds, a whole command, runs side by side.
"""

import argparse

from src.cli.argparse_main import Parser, argparse_main
from src.core.process import import_lightning


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


@argparse_main
def main() -> None:
    parser = Parser(
        prog="python -m src.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=count, default=33, help="timed batches of a turn (default: 33)")
    parser.add_argument(
        "--rounds",
        type=count,
        help="turns of each (default: 20, two epochs of MNIST; on a GPU 6; with --time-to 1, with --side-by-side 3)",
    )
    parser.add_argument("--time-to", type=float, metavar="PERCENT", help="the longer mode")
    parser.add_argument("--side-by-side", action="store_true", help="one run against two at once, in processes")
    parser.add_argument("--seeds", type=count, default=10, help="of b in a round of --time-to (default: 10)")
    parser.add_argument("--runs", type=count, default=4, help="most runs at once on a GPU (default: 4)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    chosen = parser.parse_intermixed_args()

    import_lightning()
    from src.benchmark.speed import run  # here, because --help should not wait for PyTorch

    run(chosen)


if __name__ == "__main__":
    main()
