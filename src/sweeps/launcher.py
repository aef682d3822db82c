"""Which jobs a sweep has, which worker and which GPU each gets, and what becomes of a job whose process is lost."""

import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import DictConfig, OmegaConf

from src.cli.hydra_main import remove_unstarted_run
from src.core.compat import hydras_sweeper, joblib_job, pickled, unpickled
from src.core.errors import UserError
from src.core.files import list_tree
from src.core.run_folder import format_continue_command

BasicSweeper = hydras_sweeper()
ZIP = "hydra.callbacks.sweep.zip"
JOBLIB = "JoblibLauncher"


def planned_jobs(overrides: Sequence[str], zipped: Sequence[str] = ()) -> list[list[str]]:
    """The overrides of each job of a multirun. Raises UserError for `zipped` keys that cannot change together."""
    return _product(OverridesParser.create().parse_overrides(list(overrides)), zipped)


def _product(overrides: Sequence[Override], zipped: Sequence[str]) -> list[list[str]]:
    lists = {one.key_or_group: BasicSweeper.split_arguments([one], None)[0] for one in overrides}
    counts = {key: len(lists.get(key, ())) for key in zipped}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        told = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise UserError(f"{ZIP}: keys that change together need as many values each: {told}")
    if zipped:
        together = zip(*(lists[key] for key in zipped), strict=True)
        lists[zipped[0]] = [[one for part in parts for one in part] for parts in together]
    kept = [values for key, values in lists.items() if key not in zipped[1:]]
    return [[one for part in parts for one in part] for parts in product(*kept)]


class ZipSweeper(BasicSweeper):  # type: ignore[misc, valid-type]
    """Hydra's own sweeper, with keys whose values change together and jobs that may be lost."""

    def setup(self, **parts: Any) -> None:
        super().setup(**parts)
        self.before = list_tree(Path(self.config.hydra.sweep.dir).resolve())
        self.launcher: Any = Launcher(self.launcher)
        if type(self.launcher.chosen).__name__ == JOBLIB:
            context()

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        jobs = _product(overrides, OmegaConf.select(self.config, ZIP) or ())
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Composes one job of each choice of groups: jobs that differ in values alone fail alike.

        Hydra would compose all of them before the first begins, and each again where it runs.
        """
        options = cache(self.hydra_context.config_loader.get_group_options)

        def is_choice(override: str) -> bool:
            return bool(options(override.partition("=")[0].lstrip("+~").partition("@")[0]))

        try:
            super().validate_batch_is_legal(list({tuple(filter(is_choice, job)): job for job in batch}.values()))
        except Exception:
            remove_unstarted_run(Path(self.config.hydra.sweep.dir), self.before)
            raise


class Launcher:
    """What launches the jobs, and names one whose process is gone while the others go on."""

    def __init__(self, chosen: Any) -> None:
        self.chosen, self.config = chosen, chosen.config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        kind = type(self.chosen).__name__
        if kind == JOBLIB:
            return self._joblib(job_overrides, initial_job_idx)
        if kind == "LocalLauncher" and (names := list_gpus(self.config)):  # it would hide them
            one_each = [f"+hydra.job.env_set.CUDA_VISIBLE_DEVICES='{name}'" for name in names]
            job_overrides = [[*job, one_each[number % len(names)]] for number, job in enumerate(job_overrides)]
        if kind in ("LocalLauncher", "SlurmLauncher"):
            return self._submitit(job_overrides, initial_job_idx)
        return self.chosen.launch(job_overrides, initial_job_idx)

    def _lost(self, overrides: Sequence[str], why: str) -> JobReturn:
        from src.sweeps.callback import METRICS_FILE, record_lost_job

        config = self.chosen.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
        folder = Path(config.hydra.sweep.dir, config.hydra.sweep.subdir)
        if not (folder / METRICS_FILE).exists():
            record_lost_job(config, folder, why)
        return JobReturn(overrides=overrides, status=JobStatus.COMPLETED)

    def _submitit(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        import submitit
        from submitit.core.utils import FailedJobError, UncompletedJobError

        ask, known, waiting = submitit.Job.results, {}, iter(job_overrides)

        def results(job: Any) -> list[Any]:  # asked for in turn; by a job of several tasks for each
            if job.job_id not in known:
                known[job.job_id] = next(waiting)
            try:
                return ask(job)
            except (UncompletedJobError, FailedJobError):
                why = f"job {job.job_id} ended without a result ({job.state}); its log is {job.paths.stderr}"
                return [self._lost(known[job.job_id], why)]

        with patch.object(submitit.Job, "results", results):
            return self.chosen.launch(job_overrides, first)

    def _joblib(self, job_overrides: Sequence[Sequence[str]], first: int) -> Sequence[JobReturn]:
        """n_jobs=-1, the default, is a job a GPU, or one a core where there is none; more jobs than GPUs share them."""
        names, wanted = list_gpus(self.config), int(self.chosen.joblib["n_jobs"])
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        count = min(wanted if wanted > 0 else len(names) or max(cores + 1 + wanted, 1), len(job_overrides))
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(cores // count, 1)))}
        environments = [
            environment | ({"CUDA_VISIBLE_DEVICES": names[number % len(names)]} if names else {})
            for number in range(count)
        ]
        jobs = [joblib_job(self.chosen, overrides, first + number) for number, overrides in enumerate(job_overrides)]
        try:
            return run_jobs(jobs, environments, lambda number, why: self._lost(job_overrides[number], why))
        except SystemExit as stop:
            command = format_continue_command(Path(self.config.hydra.sweep.dir, "multirun.yaml"))
            name = signal.Signals(int(stop.code or 0) - 128).name
            print(f"\nstopped by {name}; continue with: {command}", file=sys.stderr)
            raise


def list_gpus(config: DictConfig) -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them; none if the jobs want none."""
    if OmegaConf.select(config, "trainer.accelerator") not in ("auto", "gpu", "cuda"):
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@cache
def context() -> Any:
    """How workers are started. The process that they are forked from is, at once: it imports while this one goes on."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver  # for POSIX alone

    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(["src.sweeps.worker"])
    forkserver.ensure_running()
    return found


class Worker:
    """A process that does one job after another."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.pipe, there = context().Pipe()
        self.process = context().Process(target=_work, args=(there, environment))
        self.process.start()
        there.close()

    def result(self) -> JobReturn | None:
        """None if the process ended instead."""
        with suppress(EOFError, ConnectionError):
            if self.pipe.poll():
                return unpickled(self.pipe.recv_bytes())
        self.process.join()
        return None


def _work(pipe: Connection, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    if os.name == "posix":
        os.setpgid(0, 0)  # Ctrl-C is for the sweep, which then stops each worker, once
    import torch  # before the environment was set, where this process is forked

    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    with suppress(EOFError):  # the sweep is at its end
        while True:
            pipe.send_bytes(pickled(unpickled(pipe.recv_bytes())()))


def run_jobs(
    jobs: Sequence[Callable[[], JobReturn]],
    environments: Sequence[dict[str, str]],
    lost: Callable[[int, str], JobReturn],
) -> list[JobReturn]:
    """Does each job in one of as many processes as there are environments. `lost` gives what stands in for a job whose
    process ended; it is told the job's place and why."""
    results: dict[int, JobReturn] = {}
    todo, at_work = deque(range(len(jobs))), dict[int, int]()  # jobs by worker
    workers = [Worker(environment) for environment in environments]
    try:
        while todo or at_work:
            for number, worker in enumerate(workers):
                if todo and number not in at_work:
                    at_work[number] = todo.popleft()
                    worker.pipe.send_bytes(pickled(jobs[at_work[number]]))
            ends = {end: n for n in at_work for end in (workers[n].pipe, workers[n].process.sentinel)}
            for number in {ends[end] for end in wait(ends)}:  # type: ignore[index]
                job, worker = at_work.pop(number), workers[number]
                result = worker.result()
                if result is None:
                    code = worker.process.exitcode
                    killed = "was killed, perhaps for lack of memory" if code == -9 else f"ended with {code}"
                    result = lost(job, f"its process {killed}")
                    workers[number] = Worker(environments[number])
                results[job] = result
    finally:
        for number, worker in enumerate(workers):
            worker.pipe.close()
            if number in at_work:  # the sweep is stopped: each job writes a checkpoint
                worker.process.terminate()
        for worker in workers:
            worker.process.join()
    return [results[number] for number in range(len(jobs))]
