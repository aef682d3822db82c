"""What Hydra does around the jobs of a multirun: names, failures, continuing, the report at the end."""

import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.cli.hydra_main import FAILED
from src.core.compat import get_job_error, use_sweeper
from src.core.error_messages import describe_error
from src.core.errors import UserError, print_error
from src.core.run_folder import check_files, read_text
from src.sweeps.launcher import ZIP, ZipSweeper, planned_jobs
from src.sweeps.progress import SweepProgress, print_line
from src.sweeps.runs import flatten_config, plain_yaml, reject_different_config

METRICS_FILE, ERROR_FILE = "metrics.json", "error.txt"
watches: list[SweepProgress] = []  # not of the Sweep, which launchers send to other processes


class SweepCallback(Callback):
    """Works with every launcher: the jobs may run in other processes, or on other machines.

    A sweep whose hydra.sweep.dir names the folder of an earlier one continues it: src.cli.hydra_main skips the jobs that
    have a metrics.json there, and resumes the others. `zip` is for src.sweeps.launcher, `fail_fast` for the function.
    """

    def __init__(self, zip: Sequence[str] = (), fail_fast: bool = False) -> None: ...

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            if "study_name" in config:
                check_files(Path(config.hydra.run.dir))
        except UserError as error:  # Hydra would make a warning of it
            sys.exit(print_error(str(error)))

    def __getstate__(self) -> dict[str, Any]:  # submitit pickles a job within it, to put it into the queue again
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        use_sweeper(ZipSweeper)
        params = OmegaConf.select(config, "hydra.sweeper.params") or {}
        arguments = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
        overrides = OverridesParser.create().parse_overrides(arguments)
        swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
        shared = {override.key_or_group for override in overrides} - swept
        # A job's folder is named by the swept keys alone: overrides that all jobs share say nothing.
        # Every job's own config is composed anew from this list of Hydra overrides.
        config.hydra.overrides.hydra.append(
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"
        )
        folder = Path(config.hydra.sweep.dir)
        before = plain_yaml(folder / "multirun.yaml")  # None as well where Hydra was killed while it wrote it
        try:
            check_files(folder)
            if isinstance(before, dict):
                fix = "continue it by its own command, or begin another folder"
                reject_different_config(
                    flatten_config(OmegaConf.create(before)), flatten_config(config), f"the sweep in {folder}", fix
                )
            jobs = planned_jobs(arguments, OmegaConf.select(config, ZIP) or ())
            if not jobs:
                raise UserError(f"{' '.join(arguments)}: a sweep of no jobs")
        except (UserError, OmegaConfBaseException) as error:  # Hydra would make a warning of it
            sys.exit(print_error(str(error)))
        (folder / FAILED).unlink(missing_ok=True)
        place = os.path.relpath(folder)
        metric = config.get("optimized_metric")
        print_line(f"{len(jobs)} jobs in {place}" + (f", told by {metric}" if metric else ""))
        print_line(f"if it stops early, the same command continues it with hydra.sweep.dir={shlex.quote(place)}")
        while watches:  # of a sweep that a signal ended in this process
            watches.pop().stopped.set()
        watches.append(SweepProgress(folder, len(jobs), set.intersection(*map(set, jobs))).__enter__())

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        # A worker may outlive its sweep: whoever continues the sweep waits for the job instead of doing it twice.
        self.lock = FileLock(folder / ".lock")
        self.lock.acquire()
        if not (folder / METRICS_FILE).exists():
            (folder / ERROR_FILE).unlink(missing_ok=True)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        if job_return.status == JobStatus.FAILED:
            record_failure(Path(config.hydra.runtime.output_dir), get_job_error(job_return))
            stop_after_failure(config)
            # Else the sweeper would raise the first failure, and nothing could be said about the others.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        self.lock.release()
        for watch in watches:  # where the jobs run in its own process
            watch.look()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        watches.pop().__exit__()
        # Here, because Hydra imports this file before it has read the command line to its end.
        from src.sweeps.report import report

        folder = Path(config.hydra.sweep.dir)
        try:
            code = report([folder], folder)
            errors = [read_text(file).splitlines() for file in folder.glob(f"**/{ERROR_FILE}")]
        except Exception as error:  # Hydra would make a warning of it
            if line := describe_error(error):
                sys.exit(print_error(line))
            traceback.print_exc()
            sys.exit(1)
        if errors:
            sys.exit(1 if any(len(lines) > 1 for lines in errors) else 2)
        if code:
            sys.exit(code)


def stop_after_failure(config: DictConfig) -> None:
    """Keeps the jobs that have not begun from beginning, if that was asked for."""
    if config.hydra.callbacks.sweep.fail_fast:
        Path(config.hydra.sweep.dir, FAILED).touch()


def record_lost_job(config: DictConfig, folder: Path, why: str) -> None:
    """Names a job whose process ended, and leaves error.txt in its place."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ERROR_FILE).write_text(f"lost: {why}\n\nThe same command continues the sweep.\n")
    stop_after_failure(config)


def record_failure(folder: Path, error: BaseException) -> None:
    """error.txt says why in its first line, for a bug with the traceback below."""
    line = describe_error(error)
    text = f"{type(error).__name__}: {' '.join(str(error).split())}\n\n" + "".join(traceback.format_exception(error))
    (folder / ERROR_FILE).write_text(text if line is None else f"{line}\n")
