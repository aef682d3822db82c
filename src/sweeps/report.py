"""Write the comparison of runs: sweep.csv, report.md, plots, and the table on the terminal."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from src.core.errors import escape_control_characters
from src.core.files import write_atomically
from src.core.run_folder import STATUS_FILE, read_status, write_status
from src.sweeps import plots, tables
from src.sweeps.runs import FAILED, LOST, UNFINISHED, Comparison, compare_runs, read_runs


def write_report(folders: Sequence[Path], output: Path) -> Comparison:
    """Compare the runs below the folders, write the report into `output` and print it.

    Raises UserError if no run can be read.
    """
    comparison = compare_runs(read_runs(folders))
    title = ", ".join(folder.resolve().name for folder in folders)
    output.mkdir(parents=True, exist_ok=True)
    tables.write_csv(comparison, output / "sweep.csv")
    images = plots.plot_comparison(comparison, output) | plots.plot_studies(folders, output)
    markdown = tables.format_markdown(comparison, title, images)
    write_atomically(output / "report.md", markdown.encode(errors="backslashreplace"))
    tables.print_comparison(comparison, title)
    print(f"report in {os.path.relpath(output)}: report.md sweep.csv {' '.join(images)}", flush=True)
    for run in comparison.unreadable:
        print(escape_control_characters(f"error: {run.error}"), file=sys.stderr)
    return comparison


def report_ended_sweep(sweep: Path) -> int:
    """Report a sweep whose launcher has ended; a job that still counts as running is lost, its process has died.

    Returns exit code 0; 1 if a job was lost, stopped, failed by a bug or cannot be read; 2 if one failed by a mistake.
    """
    for file in sweep.rglob(STATUS_FILE):
        if (read_status(file.parent) or {}).get("state") == "running":
            write_status(file.parent, LOST, "its process has died, perhaps for lack of memory")
    comparison = write_report([sweep], sweep)
    failed = [run for run in comparison.runs if run.state in (FAILED, LOST)]
    if comparison.unreadable or any(run.state == LOST or run.has_traceback for run in failed):
        return 1
    if failed:  # which keeps the other jobs from starting with fail_fast
        return 2
    return int(any(run.state == UNFINISHED for run in comparison.runs))
