"""Write the comparison of runs: sweep.csv, report.md, plots, and the table on the terminal."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from src.core.errors import escape_control_characters
from src.core.files import write_atomically
from src.core.run_folder import read_status, write_status
from src.sweeps import plots, tables
from src.sweeps.progress import print_line
from src.sweeps.runs import FAILED, LOST, compare_runs, read_runs


def write_report(folders: Sequence[Path], output: Path) -> int:
    """Compare the runs below the folders, write the report into `output` and print it.

    Returns 1 if a run cannot be read, was lost or failed by a bug, 2 if one failed by a mistake, else 0. Raises
    UserError if no run can be read.
    """
    comparison = compare_runs(read_runs(folders))
    title = ", ".join(folder.resolve().name for folder in folders)
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(comparison, output / "sweep.csv")
    images = plots.plot_comparison(comparison, output) | plots.plot_studies(folders, output)
    markdown = tables.format_markdown(comparison, title, images)
    write_atomically(output / "report.md", markdown.encode(errors="backslashreplace"))
    tables.print_comparison(comparison, title)
    print_line(f"report in {os.path.relpath(output)}: report.md sweep.csv {' '.join(images)}")
    for run in comparison.unreadable:
        print(escape_control_characters(f"error: {run.error}"), file=sys.stderr)
    failed = [run for run in comparison.runs if run.state in (FAILED, LOST)]
    has_bug = any(run.state == LOST or (read_status(run.folder) or {}).get("traceback") for run in failed)
    return 1 if comparison.unreadable or has_bug else 2 if failed else 0


def mark_lost_runs(sweep: Path) -> None:
    """Mark the jobs that still count as running when the launcher has ended: their process has died."""
    for status in sweep.rglob("status.json"):
        if (read_status(status.parent) or {}).get("state") == "running":
            write_status(status.parent, LOST, "its process has died, perhaps for lack of memory")
