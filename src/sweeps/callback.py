"""What happens around the jobs of a multirun: folder names, GPUs and threads, failures, the report at the end."""

import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.core.compat import use_sweeper
from src.core.error_messages import exit_on_error
from src.core.errors import UserError, print_error
from src.core.process import count_cores, list_gpus
from src.core.run_folder import STOP_FILE, read_yaml, reject_different_config
from src.sweeps.grid import ZIP, GridSweeper, list_jobs
from src.sweeps.progress import SweepProgress, print_line

progress: list[SweepProgress] = []  # not part of SweepCallback, which launchers pickle


class SweepCallback(Callback):
    """Name, continue and report a sweep with any launcher; its jobs may run in other processes or on other machines.

    A sweep whose hydra.sweep.dir is the folder of an earlier one continues it: src.cli.hydra_main skips finished jobs
    and resumes the others.

    Args:
        zip: Keys whose values change together instead of making a grid.
        fail_fast: Whether no further job starts after one has failed.
    """

    def __init__(self, zip: Sequence[str] = (), fail_fast: bool = False) -> None:
        self.fail_fast = fail_fast

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():  # Hydra turns exceptions of callbacks into warnings
            use_sweeper(ReportingSweeper)
            params = OmegaConf.select(config, "hydra.sweeper.params") or {}
            arguments = [f"{key}={value}" for key, value in params.items()] + list(config.hydra.overrides.task)
            overrides = OverridesParser.create().parse_overrides(arguments)
            swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
            shared = {override.key_or_group for override in overrides} - swept
            # Job folders are named by the swept keys. Each job's config is composed with these Hydra overrides.
            excluded = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"
            config.hydra.overrides.hydra.append(excluded)
            folder = Path(config.hydra.sweep.dir)
            if (folder / "multirun.yaml").exists():
                reject_different_config(read_yaml(folder / "multirun.yaml") or {}, config, f"the sweep in {folder}")
            jobs = list_jobs(arguments, OmegaConf.select(config, ZIP) or ())
            if not jobs:
                raise UserError(f"{' '.join(arguments)}: a sweep without jobs; give at least one value")
            _divide_machine(config, len(jobs))
            (folder / STOP_FILE).unlink(missing_ok=True)
            path, metric = os.path.relpath(folder), config.get("optimized_metric")
            print_line(f"{len(jobs)} jobs in {path}" + (f", ranked by {metric}" if metric else ""))
            print_line(f"to continue an interrupted sweep, add hydra.sweep.dir={shlex.quote(path)} to the same command")
            while progress:  # of a sweep that a signal has ended in this process
                progress.pop().stopped.set()
            progress.append(SweepProgress(folder, len(jobs), set.intersection(*map(set, jobs))).__enter__())

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        if job_return.status == JobStatus.FAILED:
            if self.fail_fast:
                Path(config.hydra.sweep.dir, STOP_FILE).touch()
            # Otherwise the sweeper would raise the first failure, and the others were not reported.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        for line in progress:
            line.update()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from src.sweeps.report import (  # Hydra imports this file before it has parsed the command line
            mark_lost_runs,
            write_report,
        )

        progress.pop().__exit__()
        folder = Path(config.hydra.sweep.dir)
        with exit_on_error():
            mark_lost_runs(folder)
            if code := write_report([folder], folder):
                sys.exit(code)


class ReportingSweeper(GridSweeper):
    """Finish a sweep with its report although a worker process of the launcher has died."""

    def sweep(self, arguments: list[str]) -> Any:
        try:
            with self._tolerate_lost_jobs():
                return super().sweep(arguments)
        except Exception as error:
            if not type(error).__module__.startswith("joblib"):  # which kills all workers when one of them dies
                raise
            print_error(f"a worker process has died: {' '.join(str(error).split()).partition('. ')[0]}")

    def _tolerate_lost_jobs(self) -> AbstractContextManager[Any]:
        """Let submitit's launcher wait for the other jobs when one has ended without a result."""
        if not str(self.config.hydra.launcher._target_).endswith(("SlurmLauncher", "LocalLauncher")):
            return nullcontext()
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError

        get_results = submitit.Job.results

        def results(job: Any) -> list[Any]:
            try:
                return get_results(job)
            except (UncompletedJobError, FailedJobError):
                print_error(f"job {job.job_id} ended without a result ({job.state}); its log is {job.paths.stderr}")
                return [JobReturn(status=JobStatus.COMPLETED)]

        return patch.object(submitit.Job, "results", results)


def _divide_machine(config: DictConfig, jobs: int) -> None:
    """Divide GPUs and cores among the workers of the joblib launcher; -1 is one worker per GPU or core."""
    if not str(config.hydra.launcher._target_).endswith("JoblibLauncher"):
        return
    gpus = len(list_gpus(config))
    workers = config.hydra.launcher.n_jobs
    workers = min(workers if workers > 0 else gpus or max(count_cores() + 1 + workers, 1), jobs)
    config.hydra.launcher.n_jobs = workers
    if config.threads is None:
        threads = max(1, int(os.environ.get("OMP_NUM_THREADS") or count_cores() // workers))
        OmegaConf.update(config, "hydra.job.env_set.OMP_NUM_THREADS", str(threads), force_add=True)
