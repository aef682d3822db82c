"""Private APIs of other packages, all in one place. Checked with Hydra 1.3.8, Lightning 2.6.6, torch 2.11 to 2.15."""

import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core import utils
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobStatus, run_job
from hydra.types import HydraContext, RunMode
from hydra.version import setbase
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    import lightning as L


def parse_hydra_arguments(arguments: list[str]) -> Namespace:
    """Parse Hydra's flags and the overrides, which may stand on both sides of a flag."""
    return get_args_parser().parse_intermixed_args(arguments)


def run_hydra(arguments: Namespace, task: Callable[[DictConfig], Any], config_dir: Path, config_name: str) -> None:
    """Do what hydra.main does once the command line is parsed, with errors raised instead of printed."""
    setbase("1.3")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    _run_hydra(arguments, get_args_parser(), task, str(config_dir), config_name)


def apply_overrides(overrides: Sequence[str], config: DictConfig) -> None:
    """Apply overrides to a config as Hydra applies those of a command to the config that it has composed."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    ConfigLoaderImpl.validate_sweep_overrides_legal(parsed, RunMode.RUN, from_shell=True)
    OmegaConf.set_struct(config, True)
    ConfigLoaderImpl._apply_overrides_to_config(parsed, config)


def get_composed_config(error: BaseException) -> DictConfig:
    """Return the config that an override was applied to; an empty one if it chose an option of a config group."""
    cause: Any = error.__cause__
    return cause.parent_node._get_root() if cause else DictConfig({})


def get_basic_sweeper() -> Any:
    """Return Hydra's own sweeper from the module that its search for plugins has loaded anew."""
    Plugins.instance()
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper


def use_sweeper(sweeper: type) -> None:
    """Replace Hydra's own sweeper, because it takes plugins from its own packages only."""
    Plugins.instance().class_name_to_class["hydra._internal.core_plugins.basic_sweeper.BasicSweeper"] = sweeper


def keep_configs_of_finished_runs() -> None:
    """Let Hydra write no config where a run is finished: it writes one for each job if a sweep is continued."""
    save = utils._save_config
    utils._save_config = lambda *values: (values[2].parent / "metrics.json").exists() or save(*values)


def run_as_job(task: Callable[[DictConfig], Any], config: DictConfig) -> Any:
    """Run the task in a folder of its own, as Hydra runs the job of a command, without its log."""
    context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
    result = run_job(task, config, "hydra.run.dir", None, context, configure_logging=False)
    if result.status == JobStatus.FAILED:
        raise result._return_value  # its property would print a line of its own
    return result.return_value


def restart_at_next_batch(trainer: "L.Trainer") -> None:
    """Resume with the batch at whose start the checkpoint was written.

    Lightning expects checkpoints of the end of a batch, and would count this batch and the last step twice. It skips
    ReduceLROnPlateau at the end of a resumed epoch, because it saves no metrics.
    """
    fit_loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch_loop.batch_progress.is_last_batch = False
    epoch_loop.batch_progress.total.ready = epoch_loop.batch_progress.total.completed
    epoch_loop._batches_that_stepped -= epoch_loop.restarting and not epoch_loop._should_accumulate()
    fit_loop._restarting = fit_loop._resuming_from_checkpoint = False


def begin_dataloaders(trainer: "L.Trainer") -> None:
    """Begin the training DataLoaders anew, with the permutation of this epoch."""
    from lightning.fabric.utilities.data import _set_sampler_epoch

    fit_loop: Any = trainer.fit_loop
    for loader in fit_loop._combined_loader.flattened:
        _set_sampler_epoch(loader, trainer.current_epoch)
    iter(fit_loop._data_fetcher)


def skip_batches(trainer: "L.Trainer", batches: int) -> None:
    """Read past so many batches of the training DataLoaders."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    for _ in range(batches):
        next(fetcher)
    fetcher.fetched -= batches  # which Lightning adds


def get_stopping_criteria(trainer: "L.Trainer") -> list[Any]:
    """Return what may end the training: numbers of epochs and steps, EarlyStopping's patience, a Timer's duration."""
    from lightning.pytorch.callbacks import Timer

    patience = {callback.state_key: callback.patience for callback in trainer.early_stopping_callbacks}
    durations = [callback._duration for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    return [trainer.max_epochs, trainer.max_steps, patience, durations]


def get_log_step(trainer: "L.Trainer") -> int:
    """Return the step that loggers get, which counts batches, not steps, if a module has several optimizers."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def disable_requeue_and_broadcast(trainer: "L.Trainer") -> None:
    """Disable Lightning's requeueing on Slurm, and the broadcast before every step of whether SIGTERM was received."""
    trainer._accelerator_connector.cluster_environment.auto_requeue = False  # type: ignore[attr-defined]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def set_closure_loss(closure: Any, loss: Any) -> None:
    """Mark Lightning's closure of a step as run, with `loss` as its result."""
    from lightning.pytorch.loops.optimization.automatic import ClosureResult

    closure._result = ClosureResult(loss)
