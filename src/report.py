"""Compares the runs below some folders: python -m src.report outputs/mnist/…_multirun

Writes sweep.csv, report.md and its pictures, and prints the table, the best first. Every sweep does so at its end.
"""

import argparse
import os
import sys
from pathlib import Path

from src.errors import UserError, say


def report(folders: list[Path], output: Path) -> None:
    """Raises UserError if there are no runs in the folders."""
    # Here, because --help should not wait for matplotlib.
    from src.sweeps import pictures, tables
    from src.sweeps.jobs import compare, read_jobs

    comparison = compare(read_jobs(folders))
    title = ", ".join(folder.resolve().name for folder in folders)
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(comparison, output / "sweep.csv")
    drawn = pictures.draw(comparison, output)
    (output / "report.md").write_text(tables.markdown(comparison, title, drawn))
    tables.show(comparison, title)
    print(f"report in {os.path.relpath(output)}:", *["report.md", "sweep.csv", *drawn])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m src.report", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep, a run, or what holds them")
    parser.add_argument(
        "--output", type=Path, help="where the report goes: the folder itself, or outputs/report for several folders"
    )
    arguments = parser.parse_args()
    alone = arguments.folders[0] if len(arguments.folders) == 1 else Path("outputs/report")
    try:
        report(arguments.folders, arguments.output or alone)
    except UserError as error:
        sys.exit(say(str(error)))


if __name__ == "__main__":
    main()
