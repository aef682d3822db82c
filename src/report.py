"""Compares the runs below some folders: python -m src.report outputs/mnist/…_multirun

Writes sweep.csv, report.md and its pictures, and prints the table, the best first. Every sweep does so at its end.
"""

from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main


@argparse_main
def main() -> int:
    parser = Parser(prog="python -m src.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, a run, or what holds them")
    parser.add_argument(
        "--output", type=Path, help="where the report goes: the folder itself, or outputs/report for several folders"
    )
    arguments = parser.parse_args()

    from src.sweeps.report import report

    alone = arguments.folders[0] if len(arguments.folders) == 1 else Path("outputs/report")
    return report(arguments.folders, arguments.output or alone)


if __name__ == "__main__":
    main()
