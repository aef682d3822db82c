"""A comparison of runs written down: sweep.csv, report.md, pictures, and the table on the terminal."""

import os
import sys
from pathlib import Path

from src.command.process import write_whole
from src.errors import printable
from src.sweeps import pictures, tables
from src.sweeps.jobs import compare, read_jobs
from src.sweeps.watch import tell


def report(folders: list[Path], output: Path) -> int:
    """The exit code: 1 if some runs cannot be read. Raises UserError if there are none in the folders that can."""
    comparison = compare(read_jobs(folders))
    title = ", ".join(folder.resolve().name for folder in folders)
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(comparison, output / "sweep.csv")
    drawn = pictures.draw(comparison, output) | pictures.draw_studies(folders, output)
    write_whole(output / "report.md", tables.markdown(comparison, title, drawn).encode(errors="backslashreplace"))
    tables.show(comparison, title)
    tell(" ".join([f"report in {os.path.relpath(output)}:", "report.md", "sweep.csv", *drawn]))
    for job in comparison.damaged:
        print(printable(f"error: {job.error}"), file=sys.stderr)
    return 1 if comparison.damaged else 0
