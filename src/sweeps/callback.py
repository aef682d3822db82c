"""What happens around the jobs of a multirun: checks, folder names, GPUs, failures, the report."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from src.core import run_folder
from src.core.compat import get_basic_sweeper, keep_configs_of_finished_runs, use_sweeper
from src.core.config import infer_mode, reject_wrong_keys, resolve_and_validate
from src.core.error_messages import exit_on_error
from src.core.errors import UserError, escape_control_characters, format_metric, print_error
from src.core.files import exclusive_lock
from src.core.process import count_cores, count_gpus

keep_configs_of_finished_runs()  # also in worker processes, which import this file


class SweepCallback(Callback):
    """Name, continue and report a sweep with any launcher; its jobs may run in other processes or on other machines.

    A sweep whose hydra.sweep.dir is the folder of an earlier one continues it: src.cli.hydra_main skips finished jobs
    and resumes the others. The report averages over the values of the keys `average_over`.
    """

    def __init__(self, average_over: Sequence[str] = ("seed",)) -> None:
        self.job_count = 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():  # Hydra turns exceptions of callbacks into warnings
            use_sweeper(ReportingSweeper)
            reject_wrong_keys(config)
            jobs = list_jobs(config.hydra)
            _check_folder(config.hydra, jobs)
            _validate_jobs(config, jobs)
            path, metric, self.job_count = os.path.relpath(config.hydra.sweep.dir), config.optimized_metric, len(jobs)
            order = "lowest" if (config.optimized_mode or infer_mode(metric)) == "min" else "highest"
            print(f"{len(jobs)} jobs in {path}" + (f", ranked by {metric}, {order} first" if metric else ""))
            print(f"to continue an interrupted sweep, add hydra.sweep.dir={shlex.quote(path)} to the same command")
            # Hydra names the folder of a job by its overrides: leave out those that all jobs share.
            shared = {item.partition("=")[0].lstrip("+~") for item in set.intersection(*map(set, jobs))}
            exclude = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"
            config.hydra.overrides.hydra.append(exclude)
            if len(jobs) == 1:  # no key has several values to name it by
                config.hydra.overrides.hydra.append("hydra.sweep.subdir='0'")
            launcher = config.hydra.launcher
            if launcher._target_.endswith("JoblibLauncher") and launcher.n_jobs < 0:
                launcher.n_jobs = min(count_gpus(config) or count_cores(), len(jobs))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status == JobStatus.FAILED:
            print_error(f"{folder.name}: {run_folder.read_status(folder).get('message')}")
            # Otherwise the sweeper would raise the first failure before the report.
            job_return.status, job_return.return_value = JobStatus.COMPLETED, None
        elif (score := job_return.return_value) is not None:
            line = f"{config.hydra.job.num + 1} of {self.job_count}  {folder.name}  "
            print(escape_control_characters(line + format_metric(config.optimized_metric, score)), flush=True)


class ReportingSweeper(get_basic_sweeper()):  # type: ignore[misc]
    """Hydra's own sweeper with a report, which survives a dead worker process."""

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Do nothing: SweepCallback has validated all jobs, where Hydra would compose each job twice."""

    def sweep(self, arguments: list[str]) -> None:
        hydra = self.config.hydra
        folder = Path(hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
        command = shlex.join(["python", "-m", "src.train", *words, f"hydra.sweep.dir={folder}"])
        if "submitit" in hydra.launcher._target_:
            _tolerate_lost_jobs()
        try:
            with exclusive_lock(folder):
                super().sweep(arguments)
        except SystemExit as stop:
            run_folder.print_continue_command(stop.code, command)
            raise
        except Exception as error:
            reason = " ".join(str(error).split()).partition(". ")[0][:100]
            if type(error).__module__.startswith("submitit") or "srun" in reason:
                raise UserError(f"hydra/launcher: Slurm does not work here ({reason}); joblib needs none") from error
            if not type(error).__module__.startswith("joblib"):  # which kills all workers when one of them dies
                raise
            print_error(f"a worker process has died: {reason}")
        from src.sweeps.report import write_report  # Hydra imports this file for --cfg, too

        runs = write_report([folder], folder, hydra.callbacks.sweep.average_over).runs
        if any(run.state in ("failed", "unfinished") for run in runs):
            print(f"continue with: {command}", flush=True)
            sys.exit(1)


def list_jobs(hydra: DictConfig) -> list[list[str]]:
    """Return the overrides of each job of the sweep that a `hydra` section describes."""
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # it knows what a glob(…) matches
    params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    (jobs,) = get_basic_sweeper().split_arguments(parser.parse_overrides([*params, *hydra.overrides.task]), None)
    return jobs


def _check_folder(hydra: DictConfig, jobs: list[list[str]]) -> None:
    """Raise UserError if there are no jobs, if they would share folders, or if the sweep's folder holds other ones."""
    folder = Path(hydra.sweep.dir)
    if (kind := run_folder.find_kind(folder)) not in (None, "sweep"):
        raise UserError(f"hydra.sweep.dir={folder}: holds a {kind}; type another folder")
    if not jobs:
        raise UserError(f"{' '.join(hydra.overrides.task)}: a sweep without jobs; type a value per key")
    if "override_dirname" not in OmegaConf.to_yaml(hydra.sweep):
        raise UserError("hydra.sweep.subdir: must contain ${hydra.job.override_dirname}, so that each job has a folder")
    if kind:
        before = list_jobs(OmegaConf.create(run_folder.read_file(folder / "multirun.yaml")["hydra"]))
        if not {*map(frozenset, before)} <= {*map(frozenset, jobs)}:
            raise UserError(f"{folder}: holds a sweep of other jobs; type its command again, or choose another folder")


def _validate_jobs(config: DictConfig, jobs: list[list[str]]) -> None:
    """Compose jobs until each value of a key was in one. Raises UserError for a value that is not allowed."""
    validated = set[str]()
    for number, job in enumerate(jobs):
        if validated.issuperset(job):
            continue
        validated.update(job)
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, job)
        with open_dict(composed):
            composed.hydra.job.num, composed.output_dir = number, "."
            HydraConfig.instance().set_config(composed)
            del composed["hydra"]
        resolve_and_validate(composed)


def _tolerate_lost_jobs() -> None:
    """Let submitit's launcher wait for the other jobs when one has ended without a result."""
    import submitit
    from submitit.core.utils import UncompletedJobError

    get_results = submitit.Job.results

    def get_results_or_error(job: Any) -> list[Any]:
        try:
            return get_results(job)
        except UncompletedJobError:
            print_error(f"job {job.job_id} ended without a result ({job.state}); its log is {job.paths.stderr}")
            return [JobReturn(status=JobStatus.COMPLETED)]

    submitit.Job.results = get_results_or_error  # type: ignore[method-assign, assignment]
