"""What happens around the jobs of a multirun: zipped keys, checks, folder names, GPUs, failures, the report."""

import os
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from src.core import run_folder
from src.core.compat import get_basic_sweeper, keep_configs_of_finished_runs, use_sweeper
from src.core.config import CONF, describe_unknown_key, infer_mode, list_keys, reject_wrong_keys, resolve_and_validate
from src.core.error_messages import exit_on_error
from src.core.errors import UserError, escape_control_characters, format_metric, print_error
from src.core.files import exclusive_lock
from src.core.process import count_cores, count_gpus
from src.sweeps.runs import format_continue_command, reject_different_config

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
        self.average_over, self.job_count = average_over, 0

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():  # Hydra turns exceptions of callbacks into warnings
            use_sweeper(ReportingSweeper)
            reject_wrong_keys(config)
            folder, jobs = Path(config.hydra.sweep.dir), list_jobs(config.hydra)
            if (kind := run_folder.find_kind(folder)) not in (None, "sweep"):
                raise UserError(f"hydra.sweep.dir={folder}: holds a {kind}; type another folder")
            if not jobs:
                raise UserError(f"{' '.join(config.hydra.overrides.task)}: a sweep without jobs; type a value per key")
            known = [*list_keys(config), *(item.partition("=")[0].lstrip("+") for item in jobs[0])]
            if unknown := [key for key in self.average_over if key not in known]:
                raise UserError(f"hydra.callbacks.sweep.average_over: {describe_unknown_key(unknown[0], known)}")
            _validate_jobs(config, jobs)
            if kind:
                before = run_folder.read_file(folder / "multirun.yaml")
                plain, overrides = OmegaConf.to_container(config), config.hydra.overrides.task
                reject_different_config(before, plain, f"the sweep in {folder}", overrides)
                pairs = zip(list_jobs(OmegaConf.create(before["hydra"])), jobs, strict=False)
                if "job.num" in OmegaConf.to_yaml(config.hydra.sweep) and any(old != new for old, new in pairs):
                    raise UserError(f"{folder}: other jobs have these numbers already; choose another folder")
            path, metric, self.job_count = os.path.relpath(folder), config.optimized_metric, len(jobs)
            order = "lowest" if (config.optimized_mode or infer_mode(metric)) == "min" else "highest"
            print(f"{len(jobs)} jobs in {path}" + (f", ranked by {metric}, {order} first" if metric else ""))
            print(f"to continue an interrupted sweep, add hydra.sweep.dir={shlex.quote(path)} to the same command")
            # Hydra names the folder of a job by its overrides: leave out those that all jobs share.
            shared = {item.partition("=")[0].lstrip("+~") for item in set.intersection(*map(set, jobs))}
            exclude = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"
            config.hydra.overrides.hydra.append(exclude)
            if len(jobs) == 1:  # no key has several values to name it by
                config.hydra.overrides.hydra.append("hydra.sweep.subdir='0'")
            if config.hydra.launcher._target_.endswith("JoblibLauncher"):  # it divides the cores among n_jobs processes
                n_jobs = config.hydra.launcher.n_jobs
                n_jobs = n_jobs if n_jobs > 0 else count_gpus(config) or count_cores()
                config.hydra.launcher.n_jobs = min(n_jobs, len(jobs))

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
    """Hydra's own sweeper with zipped keys and a report, which survives a dead worker process."""

    def split_arguments(self, overrides: Any, max_batch_size: int | None) -> list[list[list[str]]]:
        return list(self.split_overrides_to_chunks(list_jobs(self.config.hydra), max_batch_size))

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
            command = format_continue_command(folder / "multirun.yaml")
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


def list_jobs(hydra: DictConfig) -> list[list[str]]:
    """Return the overrides of each job of the sweep that a `hydra` section describes.

    Raises UserError for keys of hydra.callbacks.sweep.zip that cannot change together.
    """
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # it knows what a glob(…) matches
    params = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    overrides, zipped = parser.parse_overrides([*params, *hydra.overrides.task]), hydra.callbacks.sweep.get("zip", [])
    split = get_basic_sweeper().split_arguments
    # By key a list of its values, each a list of one override, or of one per zipped key.
    values = {one.key_or_group: split([one], None)[0] for one in overrides}
    counts = {key: len(values.get(key, ())) for key in zipped}
    if len({*counts.values()}) > 1 or 0 in counts.values():
        numbers = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise UserError(f"hydra.callbacks.sweep.zip: its keys must have the same number of values; {numbers}")
    if zipped:
        together = zip(*(values.pop(key) for key in zipped), strict=True)
        values["zip"] = [list(chain(*parts)) for parts in together]
    return [list(chain(*parts)) for parts in product(*values.values())]


def _validate_jobs(config: DictConfig, jobs: list[list[str]]) -> None:
    """Compose jobs until each value of a key was in one, together with each combination of config groups.

    Raises UserError for a value that is not allowed, and if hydra.sweep.subdir gives two jobs one folder.
    """
    validated, folders = set[tuple[str, ...]](), set[str]()
    for number, job in enumerate(jobs):
        groups = [item for item in job if (CONF / re.split("[=@]", item.lstrip("+~"))[0]).is_dir()]
        values = {(*groups, item) for item in job}
        if values <= validated:
            continue
        validated |= values
        composed = GlobalHydra.instance().config_loader().load_sweep_config(config, job)
        with open_dict(composed):
            composed.hydra.job.update(num=number, id=str(number))
            composed.hydra.runtime.output_dir = composed.output_dir = "."
            HydraConfig.instance().set_config(composed)
            if composed.hydra.sweep.subdir in folders:
                fix = "use ${hydra.job.override_dirname} in hydra.sweep.subdir"
                raise UserError(f"hydra.sweep.subdir={composed.hydra.sweep.subdir}: jobs would share folders; {fix}")
            folders.add(composed.hydra.sweep.subdir)
            del composed["hydra"]
        resolve_and_validate(composed)


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
