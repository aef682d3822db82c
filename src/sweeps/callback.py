"""What happens around the jobs of a multirun: folder names, GPUs and threads, failures, the report at the end."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.core import run_folder
from src.core.compat import get_basic_sweeper, keep_configs_of_finished_runs, use_sweeper
from src.core.config import describe_unknown_key, infer_mode, list_keys, reject_wrong_keys
from src.core.error_messages import exit_on_error
from src.core.errors import UserError, escape_control_characters, format_metric, print_error
from src.core.files import exclusive_lock
from src.core.process import count_cores, list_gpus
from src.sweeps import grid

keep_configs_of_finished_runs()  # also in worker processes, which import this file


class SweepCallback(Callback):
    """Name, continue and report a sweep with any launcher; its jobs may run in other processes or on other machines.

    A sweep whose hydra.sweep.dir is the folder of an earlier one continues it: src.cli.hydra_main skips finished jobs
    and resumes the others.

    Args:
        zip: Keys whose values change together instead of making a grid.
        average_over: Keys over whose values the report averages.
    """

    def __init__(self, zip: Sequence[str] = (), average_over: Sequence[str] = ("seed",)) -> None:
        self.average_over, self.n_jobs = average_over, 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():  # Hydra turns exceptions of callbacks into warnings
            use_sweeper(ReportingSweeper)
            reject_wrong_keys(config)
            run_folder.reject_other_kind("hydra.sweep.dir", Path(config.hydra.sweep.dir), "sweep")
            folder, jobs = Path(config.hydra.sweep.dir), grid.list_jobs_of_sweep(config.hydra)
            if not jobs:
                raise UserError(f"{' '.join(config.hydra.overrides.task)}: a sweep without jobs; type a value per key")
            known = [*list_keys(config), *(item.partition("=")[0].lstrip("+") for item in jobs[0])]
            if unknown := [key for key in self.average_over if key not in known]:
                raise UserError(f"hydra.callbacks.sweep.average_over: {describe_unknown_key(unknown[0], known)}")
            jobs_before = []
            if (folder / "multirun.yaml").exists():
                before = run_folder.read_yaml(folder / "multirun.yaml") or {}
                plain, overrides = OmegaConf.to_container(config), config.hydra.overrides.task
                run_folder.reject_different_config(before, plain, f"the sweep in {folder}", overrides)
                jobs_before = grid.list_jobs_of_sweep(before["hydra"]) if before else []
            pattern: Any = OmegaConf.to_container(config.hydra.sweep)
            grid.reject_shared_folders(pattern["subdir"], jobs, jobs_before)
            grid.validate_jobs(config, jobs)
            path, metric, self.n_jobs = os.path.relpath(folder), config.optimized_metric, len(jobs)
            order = "lowest" if (config.optimized_mode or infer_mode(metric)) == "min" else "highest"
            print(f"{len(jobs)} jobs in {path}" + (f", ranked by {metric}, {order} first" if metric else ""))
            print(f"to continue an interrupted sweep, add hydra.sweep.dir={shlex.quote(path)} to the same command")
            # Each job's config is composed with these overrides of Hydra's own keys.
            shared = {item.partition("=")[0].lstrip("+~") for item in set.intersection(*map(set, jobs))}
            job_overrides = [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"]
            if len(jobs) == 1:  # no key has several values to name it by
                job_overrides.append("hydra.sweep.subdir='0'")
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
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status == JobStatus.FAILED:
            print_error(f"{folder.name}: {(run_folder.read_status(folder) or {}).get('message')}")
            # Otherwise the sweeper would raise the first failure before the report.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        elif (score := job_return.return_value) is not None:
            line = f"{config.hydra.job.num + 1} of {self.n_jobs}  {folder.name}  "
            print(escape_control_characters(line + format_metric(config.optimized_metric, score)), flush=True)


class ReportingSweeper(get_basic_sweeper()):  # type: ignore[misc]
    """Hydra's own sweeper with zipped keys and a report, which survives a dead worker process."""

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
        return list(self.split_overrides_to_chunks(grid.list_jobs_of_sweep(self.config.hydra), max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: SweepCallback has validated all jobs, where Hydra would compose each job twice."""

    def sweep(self, arguments: list[str]) -> None:
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        tolerance = _tolerate_lost_jobs() if "submitit" in self.config.hydra.launcher._target_ else nullcontext()
        try:
            with exclusive_lock(folder), tolerance:
                super().sweep(arguments)
        except SystemExit as stop:
            command = run_folder.format_continue_command(folder / "multirun.yaml")
            run_folder.print_continue_command(stop.code, command)
            raise
        except Exception as error:
            reason = " ".join(str(error).split()).partition(". ")[0][:100]
            if type(error).__module__.startswith("submitit") or "srun" in reason:
                raise UserError(f"hydra/launcher: Slurm does not work here ({reason}); joblib needs none") from error
            if not type(error).__module__.startswith("joblib"):  # which kills all workers when one of them dies
                raise
            print_error(f"a worker process has died: {reason}")
        from src.sweeps.report import report_ended_sweep  # Hydra imports this file for --cfg, too

        if code := report_ended_sweep(folder):
            sys.exit(code)


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
