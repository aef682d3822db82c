"""A comparison of runs written down: sweep.csv, report.md, pictures, and the table on the terminal."""

import os
import sys
from pathlib import Path

from src.core.errors import escape_control_characters
from src.core.files import write_atomically
from src.sweeps import plots, tables
from src.sweeps.progress import print_line
from src.sweeps.runs import compare_runs, read_runs


def report(folders: list[Path], output: Path) -> int:
    """The exit code: 1 if some runs cannot be read. Raises UserError if there are none in the folders that can."""
    comparison = compare_runs(read_runs(folders))
    title = ", ".join(folder.resolve().name for folder in folders)
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(comparison, output / "sweep.csv")
    drawn = plots.draw(comparison, output) | plots.draw_studies(folders, output)
    write_atomically(output / "report.md", tables.markdown(comparison, title, drawn).encode(errors="backslashreplace"))
    tables.show(comparison, title)
    print_line(" ".join([f"report in {os.path.relpath(output)}:", "report.md", "sweep.csv", *drawn]))
    for job in comparison.damaged:
        print(escape_control_characters(f"error: {job.error}"), file=sys.stderr)
    return 1 if comparison.damaged else 0
