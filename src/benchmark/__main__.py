"""Measure the time to a test accuracy, against the baseline: python -m src.benchmark [key=value ...].

`experiment=fastest`, or the experiment named, is trained to its end with several seeds. The baseline is trained with
several seeds until it first has the test accuracy of --time-to, tested after each epoch; tests are not timed. Its
pipeline is that of its authors: torchvision's transforms per image in a DataLoader, default memory layout. The two take
turns, so that a noisy machine is noisy for both: after each run, each baseline trains for an epoch. Soft labels are
computed anew for each run, and timed.
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
    parser.add_argument("--time-to", type=float, default=99.4, metavar="PERCENT", help="test accuracy (default: 99.4)")
    parser.add_argument("--seeds", type=positive_int, default=10, help="runs of the experiment (default: 10)")
    parser.add_argument("--baseline-seeds", type=positive_int, default=3, help="runs of the baseline (default: 3)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    arguments = parser.parse_intermixed_args()

    import_lightning()
    from src.benchmark.speed import compare_times

    overrides = ["experiment=fastest", *arguments.overrides]  # Hydra takes the last experiment
    compare_times(arguments.time_to, overrides, arguments.seeds, arguments.baseline_seeds)


if __name__ == "__main__":
    main()
