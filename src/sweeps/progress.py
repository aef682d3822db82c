"""Print one line for each job of a sweep, or trial of a study, that ends, wherever it runs."""

import re
import sys
from collections.abc import Collection
from datetime import timedelta
from math import isfinite, nan
from pathlib import Path
from threading import Event, Thread
from time import monotonic

from src.core.errors import escape_control_characters, format_metric
from src.core.run_folder import STATUS_FILE, read_status
from src.sweeps.runs import FINISHED, PRUNED, STATES, Run, read_run


class SweepProgress(Thread):
    """Look into `folder` every second for jobs that have ended, until the context is left.

    `total` is the number of jobs; `shared` are the overrides of all jobs, which are not printed.
    """

    def __init__(self, folder: Path, total: int, shared: Collection[str] = ()) -> None:
        super().__init__(daemon=True)
        self.folder, self.total, self.shared = folder, total, shared
        self.stopped, self.started_at = Event(), monotonic()
        self.times: dict[Path, int] = {}
        self.ended: dict[Path, Run] = {}
        self.ended_before = len(self._find_ended())

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()

    def run(self) -> None:
        layers, is_last = None, False
        while not is_last:
            is_last = self.stopped.wait(1)
            if layers is None and (layers := next(self.folder.glob("*/layers.txt"), None)):
                print(layers.read_text(encoding="utf-8").rstrip())
            for job in self._find_ended():
                is_good = job.state in (FINISHED, PRUNED)
                line = self._describe(job) if is_good else f"failed: {job.folder.name}: {job.error}"
                print(escape_control_characters(line), file=sys.stdout if is_good else sys.stderr, flush=True)

    def _find_ended(self) -> list[Run]:
        """Return the jobs that have ended since the last call, some of them once more than before."""
        files = sorted((file.stat().st_mtime_ns, file.parent) for file in self.folder.rglob(STATUS_FILE))
        new = [folder for time, folder in files if self.times.get(folder) != time]
        self.times = {folder: time for time, folder in files}
        ended = {folder: read_run(folder) for folder in new if (read_status(folder) or {}).get("state") in STATES}
        self.ended |= ended
        return list(ended.values())

    def _describe(self, job: Run) -> str:
        metric = str(job.config.get("optimized_metric"))
        choose = min if job.config.get("optimized_mode") == "min" else max
        overrides = [re.sub(r"^[\w.]+\.(?=\w+=)", "", item) for item in job.overrides if item not in self.shared]
        scores = [run.metrics[metric] for run in self.ended.values() if isfinite(run.metrics.get(metric, nan))]
        parts = [f"{len(self.ended)} of {self.total}", " ".join(overrides) or job.folder.name]
        parts.append(format_metric(metric, job.metrics[metric]) if metric in job.metrics else job.state)
        if scores:
            parts.append(f"best {format_metric(metric, choose(scores))}")
        if left := self.total - len(self.ended):
            seconds = (monotonic() - self.started_at) / max(len(self.ended) - self.ended_before, 1) * left
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return "  ".join(parts)
