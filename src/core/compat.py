"""What is taken from inside other packages, in one place. Checked on Hydra 1.3.8, Lightning 2.6.6, torch 2.11 to 2.15.

A new version of one of them breaks this file first; nothing else here uses a name that begins with an underscore.
"""

import os
import pickle
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job
from hydra.types import HydraContext
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf

from src.core.errors import UserError
from src.core.files import write_atomically

if TYPE_CHECKING:
    import lightning as L


def parse_hydra_arguments(arguments: list[str]) -> Namespace:
    """Parse Hydra's flags and the overrides, which may stand on both sides of a flag. Raises UserError."""

    def fail(message: str) -> NoReturn:
        raise UserError(f"{message}; keys have no dashes, and python -m src.train --hydra-help lists the flags")

    parser = get_args_parser()
    parser.error = fail  # type: ignore[method-assign, assignment]
    return parser.parse_intermixed_args(arguments)


def run_hydra(arguments: Namespace, task: Callable[[DictConfig], Any], config_dir: Path, config_name: str) -> None:
    """Do what hydra.main does once the command line is parsed, with errors raised instead of printed.

    The flags alone say whether it is a multirun: Hydra would compose the config once more to look for hydra.mode.
    """
    setbase("1.3")
    Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign, assignment]
    previous = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        _run_hydra(arguments, get_args_parser(), task, str(config_dir), config_name)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = previous


def get_composed_config(error: BaseException) -> DictConfig:
    """The config that an override did not fit into; an empty one where it was to choose of a group."""
    cause: Any = error.__cause__
    return cause.parent_node._get_root() if cause else DictConfig({})


class _WholeFiles(OmegaConf):
    @staticmethod
    def save(config: Any, f: Any, resolve: bool = False) -> None:
        write_atomically(Path(f), OmegaConf.to_yaml(config, resolve=resolve).encode())


def hydras_sweeper() -> Any:
    """Hydra's own sweeper, from the module that its search for plugins loads anew.

    The multirun.yaml that it writes is whole: a sweep that was killed over half of one would be taken for another.
    """
    Plugins.instance()
    from hydra._internal.core_plugins import basic_sweeper

    basic_sweeper.OmegaConf = _WholeFiles  # type: ignore[misc]
    return basic_sweeper.BasicSweeper


def use_sweeper(sweeper: type) -> None:
    """Puts a class in the place of Hydra's own sweeper: it takes plugins from its own packages alone."""
    own = hydras_sweeper()
    Plugins.instance().class_name_to_class[f"{own.__module__}.{own.__name__}"] = sweeper


def joblib_job(launcher: Any, overrides: Sequence[str], number: int) -> Callable[[], JobReturn]:
    """A job as Hydra's launcher for joblib does it, for any process."""
    from hydra_plugins.hydra_joblib_launcher._core import execute_job

    context, config, task = launcher.hydra_context, launcher.config, launcher.task_function
    return partial(execute_job, number, list(overrides), context, config, task, Singleton.get_state())


def pickled(value: Any) -> bytes:
    """Functions as well that stand in no module."""
    import cloudpickle

    return cloudpickle.dumps(value)


unpickled = pickle.loads


def run_as_job(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Runs the task in a folder of its own, as Hydra runs the job of a command, without its log."""
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    return run_job(task, config, "hydra.run.dir", None, context, configure_logging=False).return_value


def journal(file: Path, heartbeat: int, stale: Callable[..., None]) -> Any:
    """Optuna's journal with the heartbeat that it lacks: a file a trial, touched every so many seconds."""
    from optuna.storages import JournalStorage
    from optuna.storages._heartbeat import BaseHeartbeat
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import TrialState

    beats = file.with_name(f".{file.name}.beats")
    beats.mkdir(parents=True, exist_ok=True)

    def beat(name: object) -> float:
        (beats / str(name)).touch()
        return (beats / str(name)).stat().st_mtime  # by the disk's clock, which is the same for all

    class Journal(JournalStorage, BaseHeartbeat):
        def record_heartbeat(self, trial_id: int) -> None:
            beat(trial_id)

        def _get_stale_trial_ids(self, study_id: int) -> list[int]:
            running = self.get_all_trials(study_id, deepcopy=False, states=(TrialState.RUNNING,))
            files, now = {trial._trial_id: beats / str(trial._trial_id) for trial in running}, beat("now")
            return [n for n, one in files.items() if one.exists() and now - one.stat().st_mtime > 2 * heartbeat]

        def get_heartbeat_interval(self) -> int:
            return heartbeat

        def get_heartbeat_stale_trial_callback(self) -> Callable[..., None]:
            return stale

    return Journal(JournalFileBackend(str(file)))


def get_job_error(job: JobReturn) -> Any:
    """What a failed job raised; asked for its value, it would raise it again."""
    return job._return_value


def add_summary(writer: Any, summary: Any) -> None:
    """A summary that torch's SummaryWriter has no method for."""
    writer._get_file_writer().add_summary(summary)


def continue_logger_run(logger: Any, name: str) -> None:
    """Makes W&B's or MLflow's logger go on with the run of that name, which was begun in another process."""
    if hasattr(logger, "_wandb_init"):
        logger._id = logger._wandb_init["id"] = name
    else:
        logger._run_id = name


def get_loader_states(trainer: "L.Trainer") -> list[dict[str, Any]]:
    """Return the states of the training DataLoaders that have one, as torchdata's StatefulDataLoader."""
    loader = trainer.fit_loop._combined_loader
    return loader._state_dicts() if loader else []


def restart_at_next_batch(trainer: "L.Trainer") -> int:
    """Resume at the start of the batch before which the checkpoint was written; return its index in the epoch.

    Lightning counts such a batch and its step twice, because it expects checkpoints of the end of a batch, and skips
    ReduceLROnPlateau at the end of a resumed epoch, because it saves no metrics. It also begins a DataLoader before it
    has loaded its state if a module asks for the number of steps.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.is_last_batch = False
    epoch_loop.batch_progress.total.ready = epoch_loop.batch_progress.total.completed
    epoch_loop._batches_that_stepped -= not epoch_loop._should_accumulate()
    fit_loop._restarting = False
    return epoch_loop.batch_progress.current.completed


def restart_dataloaders(trainer: "L.Trainer", states: list[dict[str, Any]]) -> None:
    """Begin the training batches again where the DataLoaders' samplers or states say.

    Lightning begins them before it has loaded the states if a module asks for the number of steps.
    """
    fit_loop = trainer.fit_loop
    assert fit_loop._combined_loader
    fit_loop._combined_loader_states_to_load = []
    fit_loop._combined_loader._load_state_dicts(states)
    iter(fit_loop._data_fetcher)  # type: ignore[arg-type]


def disable_sigterm_broadcast(trainer: "L.Trainer") -> None:
    """Save the broadcast before every step by which Lightning's processes tell each other of a SIGTERM."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def set_closure_loss(closure: Any, loss: Any) -> None:
    """Mark Lightning's closure of a step as run, with `loss` as its result."""
    from lightning.pytorch.loops.optimization.automatic import ClosureResult

    closure._result = ClosureResult(loss)
