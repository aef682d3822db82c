"""Compare the runs below some folders: python -m src.report outputs/mnist/…_multirun.

Writes sweep.csv, report.md and plots, and prints the table, best first. Every sweep does so at its end.
"""

from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main


@argparse_main
def main() -> int:
    """Write the report of the folders on the command line; the exit code is 1 if a run cannot be read."""
    parser = Parser(prog="python -m src.report", description="Compare the runs below some folders.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, a run, or a folder of both")
    parser.add_argument("--output", type=Path, help="folder of the report; default: FOLDER, for several outputs/report")
    averaged = "keys over which runs are averaged; default: those of the sweeps, else seed"
    parser.add_argument("--average-over", type=lambda keys: keys.split(","), metavar="KEY,KEY", help=averaged)
    arguments = parser.parse_args()

    from src.sweeps.report import write_report

    default = arguments.folders[0] if len(arguments.folders) == 1 else Path("outputs/report")
    comparison = write_report(arguments.folders, arguments.output or default, arguments.average_over)
    return int(any(run.state == "unreadable" for run in comparison.runs))


if __name__ == "__main__":
    main()
