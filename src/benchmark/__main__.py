"""Measure the speed of training as ratios of runs made in turns: python -m src.benchmark [key=value ...].

a  a bare PyTorch loop over the same tensors, with the same network, augmentation and optimizer: the upper limit
b  python -m src.train: the same through Lightning, with its logging
c  the baseline's pipeline: torchvision's transforms per image in a DataLoader, default memory layout

The runs take turns every few batches, so that a noisy machine is noisy for all of them. The ratios are those of the
sums of the times; the standard error comes from the rounds.

--time-to 99.4 trains `experiment=fastest`, or the experiment named, to its end with several seeds, and the baseline,
with several seeds as well, until it first reaches that test accuracy in percent, tested after each epoch; tests are not
timed. After each run of b, each c trains for an epoch. Soft labels are computed anew for each seed of b, and timed.
"""

import argparse

from src.cli.argparse_main import Parser, argparse_main
from src.core.process import import_lightning


def positive_int(text: str) -> int:
    """Parse an int ≥ 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


@argparse_main
def main() -> None:
    """Run the benchmark of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m src.benchmark", description=__doc__, formatter_class=raw)
    parser.add_argument("--batches", type=positive_int, default=33, help="timed batches per turn (default: 33)")
    parser.add_argument("--rounds", type=positive_int, default=20, help="turns (default: 20)")
    parser.add_argument("--time-to", type=float, metavar="PERCENT", help="measure the time to a test accuracy")
    parser.add_argument("--seeds", type=positive_int, default=10, help="seeds of b for --time-to (default: 10)")
    parser.add_argument("--baseline-seeds", type=positive_int, default=3, help="seeds of c for --time-to (default: 3)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    arguments = parser.parse_intermixed_args()

    import_lightning()
    from src.benchmark import speed

    if arguments.time_to:
        overrides = ["experiment=fastest", *arguments.overrides]  # Hydra takes the last experiment
        speed.print_time_to(arguments.time_to, overrides, arguments.seeds, arguments.baseline_seeds)
    else:
        speed.print_throughput(arguments.overrides, arguments.batches, arguments.rounds)


if __name__ == "__main__":
    main()
