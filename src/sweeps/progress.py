"""Print one line for each job of a sweep, or trial of a study, that ends, wherever it runs."""

import math
import re
from collections.abc import Collection
from pathlib import Path
from threading import Event, Lock, Thread
from time import monotonic

import rich
from rich.console import Console

from src.core.errors import escape_control_characters, format_metric
from src.sweeps.runs import FINISHED, PRUNED, UNFINISHED, Run, read_run


class SweepProgress(Thread):
    """Look into `folder` every second for jobs that have ended, until the context is left.

    `total` is the number of jobs; `shared` are the overrides of all jobs, which are not printed.
    """

    def __init__(self, folder: Path, total: int, shared: Collection[str] = ()) -> None:
        super().__init__(daemon=True)
        self.folder, self.total, self.shared = folder, total, shared
        self.stopped, self.lock, self.has_printed_layers = Event(), Lock(), False
        self.ended: dict[tuple[Path, int], Run] = {}
        self.ended = self._find_ended()
        self.ended_before, self.started_at = len(self.ended), monotonic()

    def __enter__(self) -> "SweepProgress":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()
        self.update()

    def run(self) -> None:
        while not self.stopped.wait(1):
            self.update()

    def _find_ended(self) -> dict[tuple[Path, int], Run]:
        """Return jobs that have newly ended, by folder and time, since a failed job may start again."""
        files = sorted((file.stat().st_mtime_ns, file.parent) for file in self.folder.rglob("status.json"))
        runs = {(folder, time): read_run(folder) for time, folder in files if (folder, time) not in self.ended}
        return {key: run for key, run in runs.items() if run.state != UNFINISHED}

    def update(self) -> None:
        """Print a line for each job that has ended since the last call, before the first one the layer table."""
        with self.lock:
            if not self.has_printed_layers and (table := next(self.folder.glob("*/layers.txt"), None)):
                self.has_printed_layers = True
                print_line(table.read_text(encoding="utf-8").rstrip())
            for key, run in self._find_ended().items():
                self.ended[key] = run
                self._print(run)

    def _print(self, run: Run) -> None:
        if run.state not in (FINISHED, PRUNED):
            return print_line(
                escape_control_characters(f"failed: {run.folder.name}: {run.error}"), Console(stderr=True)
            )
        by_folder = {folder: ended for (folder, _), ended in self.ended.items()}
        metric, choose = str(run.config.get("optimized_metric")), max
        if run.config.get("optimized_mode") == "min":
            choose = min
        scores = [x for ended in by_folder.values() if math.isfinite(x := ended.metrics.get(metric, math.nan))]
        overrides = [re.sub(r"^[\w.]+\.(?=\w+=)", "", item) for item in run.overrides if item not in self.shared]
        parts = [f"{len(by_folder)} of {self.total}", " ".join(overrides) or run.folder.name]
        parts.append(format_metric(metric, run.metrics[metric]) if metric in run.metrics else run.state)
        parts += [f"best {format_metric(metric, choose(scores))}"] if scores else []
        seconds_per_job = (monotonic() - self.started_at) / (len(self.ended) - self.ended_before)
        left = seconds_per_job * (self.total - len(by_folder))
        parts += [f"{_format_duration(left)} left"] if left > 0 else []
        print_line(escape_control_characters("  ".join(parts)))


def _format_duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def print_line(text: str, console: Console | None = None) -> None:
    """Print above a progress bar on a terminal, without breaking the line elsewhere."""
    console = console or rich.get_console()
    console.print(text, markup=False, emoji=False, highlight=False, soft_wrap=not console.is_terminal)
