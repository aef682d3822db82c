"""Measure the speed of training, as ratios of runs made in turns: python -m src.benchmark [key=value ...].

Without --time-to, steps of python -m src.train take turns with those of a bare PyTorch loop, the upper limit: the same
network, optimizer and batches without Lightning and logging.

--time-to 99.4 trains `experiment=fast`, or the experiment named, to its end with several seeds. It trains the
baseline with several seeds until that has this test accuracy in percent, tested after each epoch; tests are not timed.
The baseline has the pipeline of its authors: torchvision's transforms per image in a DataLoader, default memory layout.
After each run of the experiment, each baseline trains for an epoch. Soft labels are computed anew for each run, and
timed.
"""

import argparse

from src.cli.argparse_main import Parser, argparse_main
from src.core.process import import_lightning


@argparse_main
def main() -> None:
    """Run the benchmark of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="python -m src.benchmark", description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=20, help="turns of the loops (default: 20)")
    parser.add_argument("--time-to", type=float, metavar="PERCENT", help="measure the time to a test accuracy")
    parser.add_argument("--seeds", type=int, default=10, help="runs of the experiment (default: 10)")
    parser.add_argument("--baseline-seeds", type=int, default=3, help="runs of the baseline (default: 3)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    arguments = parser.parse_intermixed_args()

    import_lightning()
    from src.benchmark.speed import compare_times, compare_with_bare_loop

    if arguments.time_to is None:
        return compare_with_bare_loop(arguments.overrides, arguments.rounds)
    overrides = ["experiment=fast", *arguments.overrides]  # Hydra takes the last experiment
    compare_times(arguments.time_to, overrides, arguments.seeds, arguments.baseline_seeds)


if __name__ == "__main__":
    main()
