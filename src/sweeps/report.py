"""A comparison of runs written down: sweep.csv, report.md, pictures, and the table on the terminal."""

import os
from pathlib import Path

from src.sweeps import pictures, tables
from src.sweeps.jobs import compare, read_jobs


def report(folders: list[Path], output: Path) -> None:
    """Raises UserError if there are no runs in the folders."""
    comparison = compare(read_jobs(folders))
    title = ", ".join(folder.resolve().name for folder in folders)
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(comparison, output / "sweep.csv")
    drawn = pictures.draw(comparison, output)
    (output / "report.md").write_text(tables.markdown(comparison, title, drawn))
    tables.show(comparison, title)
    print(f"report in {os.path.relpath(output)}:", *["report.md", "sweep.csv", *drawn])
