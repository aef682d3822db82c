"""Compare the runs below some folders: python -m src.report outputs/mnist/…_multirun.

Writes sweep.csv, report.html, report.md and plots, and prints the table, best first. Every sweep does so at its end.
"""

import webbrowser
from pathlib import Path

from src.cli.argparse_main import Parser, argparse_main


@argparse_main
def main() -> None:
    """Write the report of the folders on the command line."""
    parser = Parser(prog="python -m src.report", description="Compare the runs below some folders.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, a run, or a folder of both")
    parser.add_argument("--output", type=Path, help="folder of the report; default: FOLDER, for several outputs/report")
    averaged = "keys over which runs are averaged; default: seed"
    parser.add_argument("--average-over", default="seed", metavar="KEY,KEY", help=averaged)
    parser.add_argument("--open", action="store_true", help="open report.html in the browser")
    arguments = parser.parse_args()

    from src.sweeps.report import write_report

    output = arguments.output or (arguments.folders[0] if len(arguments.folders) == 1 else Path("outputs/report"))
    write_report(arguments.folders, output, arguments.average_over.split(","))
    if arguments.open:
        webbrowser.open((output / "report.html").resolve().as_uri())


if __name__ == "__main__":
    main()
