"""A line for each job of a sweep, or trial of a study, where it was started, wherever the job runs."""

import math
import re
from collections.abc import Collection
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic

import rich
from rich.console import Console

from src.core.errors import escape_control_characters, format_metric
from src.sweeps.runs import FINISHED, PRUNED, Run, read_run


class SweepProgress(Thread):
    """Looks into `folder` every second for jobs that have ended, `total` in the end, until its context is left.

    `shared` are the overrides that all jobs have, and that are not said therefore.
    """

    def __init__(self, folder: Path, total: int, shared: Collection[str] = ()) -> None:
        super().__init__(daemon=True)
        self.folder, self.total, self.shared = folder, total, shared
        self.stopped, self.looking = Event(), Lock()
        self.told: dict[tuple[Path, int], Run] = {}
        self.told = self._new()
        self.before, self.began, self.layers = len(self.told), monotonic(), False

    def __enter__(self) -> "SweepProgress":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()
        self.look()

    def run(self) -> None:
        while not self.stopped.wait(1):
            self.look()

    def _new(self) -> dict[tuple[Path, int], Run]:
        """By their file that says so and its time, since a failed job may be started again; the latest last."""
        files = [file for name in ("metrics.json", "error.txt") for file in self.folder.rglob(name)]
        ended = sorted((file.stat().st_mtime_ns, file) for file in files)
        return {(file, time): read_run(file.parent) for time, file in ended if (file, time) not in self.told}

    def look(self) -> None:
        with self.looking:
            if not self.layers and (table := next(self.folder.glob("*/layers.txt"), None)):
                self.layers = True
                print_line(table.read_text().rstrip())
            for file, job in self._new().items():
                self.told[file] = job
                self._report(job)

    def _report(self, job: Run) -> None:
        if job.status not in (FINISHED, PRUNED):
            return print_line(
                escape_control_characters(f"failed: {job.folder.name}: {job.error}"), Console(stderr=True)
            )
        ended = {file.parent: job for (file, _), job in self.told.items()}
        overrides = [one for one in job.overrides if one not in self.shared]
        metric, lower = str(job.config.get("optimized_metric")), job.config.get("optimized_mode") == "min"
        scores = [x for each in ended.values() if math.isfinite(x := each.metrics.get(metric, math.nan))]
        end = [format_metric(metric, job.metrics[metric]) if metric in job.metrics else job.status]
        end += [f"best {format_metric(metric, min(scores) if lower else max(scores))}"] if scores else []
        left = (monotonic() - self.began) / (len(self.told) - self.before) * (self.total - len(ended))
        end += [f"{_duration(left)} left"] if left > 0 else []
        lines = [
            escape_control_characters(
                "  ".join([f"{len(ended)} of {self.total}", " ".join(label) or job.folder.name, *end])
            )
            for label in (overrides, [re.sub(r"^[\w.]+\.(?=\w+=)", "", one) for one in overrides])
        ]
        console = rich.get_console()
        print_line(lines[console.is_terminal and len(lines[0]) > console.width])  # of long ones the keys' last parts


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_line(text: str, console: Console | None = None) -> None:
    """On a terminal above the bar, and broken between words alone."""
    console = console or rich.get_console()
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)
