"""What happens around the jobs of a multirun: folder names, GPUs and threads, failures, the report at the end."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from src.core.compat import get_basic_sweeper, use_sweeper
from src.core.error_messages import exit_on_error
from src.core.errors import UserError, print_error
from src.core.process import count_cores, list_gpus
from src.core.run_folder import STOP_FILE, read_yaml, reject_different_config
from src.sweeps.grid import list_jobs_of_sweep
from src.sweeps.progress import SweepProgress


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
            folder, jobs = Path(config.hydra.sweep.dir), list_jobs_of_sweep(config.hydra)
            if not jobs:
                raise UserError(f"{' '.join(config.hydra.overrides.task)}: a sweep without jobs; type a value per key")
            if (folder / "multirun.yaml").exists():
                reject_different_config(read_yaml(folder / "multirun.yaml") or {}, config, f"the sweep in {folder}")
            (folder / STOP_FILE).unlink(missing_ok=True)
            path, metric = os.path.relpath(folder), config.get("optimized_metric")
            print(f"{len(jobs)} jobs in {path}" + (f", ranked by {metric}" if metric else ""))
            print(f"to continue an interrupted sweep, add hydra.sweep.dir={shlex.quote(path)} to the same command")
            # Each job's config is composed with these overrides of Hydra's own keys.
            shared = {item.partition("=")[0].lstrip("+~") for item in set.intersection(*map(set, jobs))}
            job_overrides = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"]
            launcher, gpus = str(config.hydra.launcher._target_), list_gpus(config)
            if launcher.endswith("JoblibLauncher"):  # joblib divides the cores: it sets OMP_NUM_THREADS
                n_jobs = config.hydra.launcher.n_jobs
                n_jobs = n_jobs if n_jobs > 0 else len(gpus) or max(count_cores() + 1 + n_jobs, 1)
                config.hydra.launcher.n_jobs = min(n_jobs, len(jobs))
            elif launcher.endswith("LocalLauncher"):  # submitit starts all jobs at once, and hides the GPUs from them
                threads = os.environ.get("OMP_NUM_THREADS", max(1, count_cores() // len(jobs)))
                job_overrides.append(f"++hydra.job.env_set.OMP_NUM_THREADS='{threads}'")
                job_overrides.append(f"++hydra.job.env_set.CUDA_VISIBLE_DEVICES='{','.join(gpus)}'")
            config.hydra.overrides.hydra += job_overrides

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN and job_return.status == JobStatus.FAILED:
            if self.fail_fast:
                Path(config.hydra.sweep.dir, STOP_FILE).touch()
            # Otherwise the sweeper would raise the first failure before the report.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from src.sweeps.report import report_ended_sweep  # Hydra imports this file for --cfg, too

        with exit_on_error():
            if code := report_ended_sweep(Path(config.hydra.sweep.dir)):
                sys.exit(code)


class ReportingSweeper(get_basic_sweeper()):  # type: ignore[misc]
    """Hydra's own sweeper with zipped keys and progress, which survives a dead worker process of the launcher."""

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
        return list(self.split_overrides_to_chunks(list_jobs_of_sweep(self.config.hydra), max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose one job per combination of config groups: Hydra would compose each job twice."""
        list_options = self.hydra_context.config_loader.get_group_options
        is_group = {item: bool(list_options(re.split("[=@]", item.lstrip("+~"))[0])) for job in batch for item in job}
        jobs = {tuple(filter(is_group.get, job)): job for job in batch}
        try:
            super().validate_batch_is_legal(list(jobs.values()))
        except Exception:
            folder = Path(self.config.hydra.sweep.dir)
            if not any(folder.glob("*/.hydra")):  # no job has started
                (folder / "multirun.yaml").unlink()
            with suppress(OSError):  # not empty
                folder.rmdir()
            raise

    def sweep(self, arguments: list[str]) -> None:
        jobs = list_jobs_of_sweep(self.config.hydra)
        progress = SweepProgress(Path(self.config.hydra.sweep.dir), len(jobs), set.intersection(*map(set, jobs)))
        tolerance = _tolerate_lost_jobs() if "submitit" in self.config.hydra.launcher._target_ else nullcontext()
        try:
            with progress, tolerance:
                super().sweep(arguments)
        except Exception as error:
            if not type(error).__module__.startswith("joblib"):  # which kills all workers when one of them dies
                raise
            print_error(f"a worker process has died: {' '.join(str(error).split()).partition('. ')[0]}")


@contextmanager
def _tolerate_lost_jobs() -> Iterator[None]:
    """Let submitit's launcher wait for the other jobs when one has ended without a result."""
    import submitit
    from submitit.core.utils import FailedJobError, UncompletedJobError

    get_results = submitit.Job.results

    def get_results_or_error(job: Any) -> list[Any]:
        try:
            return get_results(job)
        except (UncompletedJobError, FailedJobError):
            print_error(f"job {job.job_id} ended without a result ({job.state}); its log is {job.paths.stderr}")
            return [JobReturn(status=JobStatus.COMPLETED)]

    with patch.object(submitit.Job, "results", get_results_or_error):
        yield
