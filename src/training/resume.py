"""Stop a run at any moment and resume it with bitwise identical results."""

import math
import os
import signal
import warnings
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torchmetrics import Metric

from src.core.compat import disable_sigterm_broadcast, get_loader_states, restart_at_next_batch, restart_dataloaders
from src.core.errors import DivergenceError, UserError
from src.core.value_types import PositiveFloat, PositiveInt
from src.data.sampler import find_batch_sampler, hash_seed
from src.training.checkpoints import LAST, PREVIOUS, is_finite


class ResumeCheckpoint(Checkpoint):
    """Write last.ckpt every `every_minutes`, every `every_steps`, on a signal and at the end; keep previous.ckpt.

    It is written where a batch starts: from the end of an epoch's last batch, where ModelCheckpoint writes, Lightning
    resumes without the validation. PyTorch is seeded anew for each batch, so no generator's state is saved.

    SIGINT and SIGTERM raise SystemExit with 128 + their number after a checkpoint, a second signal at once. SIGUSR1 and
    SIGUSR2 are then passed on to a handler that requeues the job, as submitit's. Several processes agree on a save or a
    stop every `log_every_n_steps`. As often a loss that is not finite raises DivergenceError.
    """

    def __init__(
        self, dirpath: str, every_minutes: PositiveFloat | None = 1.0, every_steps: PositiveInt | None = None
    ) -> None:
        self.folder, self.seed = Path(dirpath), torch.initial_seed()
        self.minutes, self.steps = every_minutes or math.inf, every_steps or math.inf
        self.signal, self.handlers = 0, dict[int, Any]()
        self.last_good, self.saved_at, self.saved_step = "no checkpoint yet", monotonic(), 0
        self.resumed: dict[str, Any] | None = None
        self.losses: list[tuple[str, torch.Tensor]] = []  # with their moment, until they are checked
        self.loader_states: list[dict[str, Any]] = []  # of DataLoaders that have a state, at the end of a batch

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # the batch script or submitit requeues the job

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        with suppress(ValueError):  # Python installs handlers in the main thread only
            for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")):
                if number and callable(signal.getsignal(number)):  # Lightning restores them after the training
                    self.handlers[number] = signal.signal(number, self._handle_signal)
        disable_sigterm_broadcast(trainer)
        if self.resumed:
            self._seed_generators(trainer, pl_module)
            batches, sampler = restart_at_next_batch(trainer), find_batch_sampler(trainer.train_dataloader)
            if sampler:
                sampler.set_epoch(trainer.current_epoch)
                sampler.skip(batches)
            if sampler or self.loader_states:
                restart_dataloaders(trainer, self.loader_states)
            elif batches:
                cause = (
                    f"its DataLoader has no state and {batches} batches are done; use torchdata's StatefulDataLoader"
                )
                warnings.warn(f"the rest of this epoch is drawn anew: {cause}", stacklevel=2)
        self.loader_states = get_loader_states(trainer)

    def _handle_signal(self, number: int, frame: object) -> None:
        if self.signal:
            self._exit(number)
        self.signal = number

    def _exit(self, number: int) -> NoReturn:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number](number, None)  # exits in the process that requeues the job
        raise SystemExit(128 + number)

    def _seed_generators(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        torch.manual_seed(hash_seed(self.seed, batch, trainer.global_rank, 1))  # 1: not the stream of the data

    on_train_epoch_start = on_test_start = _seed_generators  # DataLoaders may shuffle by it, networks may draw

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seed_generators(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches:  # a checkpoint does not hold gradients
            return
        is_late = monotonic() - self.saved_at >= 60 * self.minutes
        request = self._agree(trainer, self.signal or int(is_late))
        if request or trainer.global_step - self.saved_step >= self.steps:
            self._save(trainer)
        if request > 1:
            self._exit(request)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)
        if request := self._agree(trainer, self.signal, always=True):
            self._exit(request)

    def _agree(self, trainer: L.Trainer, request: int, always: bool = False) -> int:
        """Return the highest request of all processes: 1 to save, a signal's number to stop."""
        if trainer.world_size == 1:
            return request
        if trainer.global_step % trainer.log_every_n_steps and not always:  # type: ignore[attr-defined]
            return 0  # because processes that compare wait for each other
        value = torch.tensor(request, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(value, reduce_op="max"))

    def _save(self, trainer: L.Trainer) -> None:
        self._check_losses(trainer)
        if not is_finite(dict(trainer.lightning_module.named_parameters())):
            self._fail(trainer, f"a weight is not finite after step {trainer.global_step}")
        for logger in trainer.loggers:
            logger.save()  # first, because what precedes the checkpoint is not logged again
        last, new = self.folder / LAST, self.folder / "next.ckpt"
        trainer.save_checkpoint(new)
        if trainer.is_global_zero:
            if last.exists():
                os.replace(last, self.folder / PREVIOUS)
            os.replace(new, last)
        self.saved_at, self.saved_step = monotonic(), trainer.global_step
        self.last_good = f"the last good checkpoint is {last} (step {self.saved_step})"

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        modules = pl_module.named_modules()
        metrics: list[Any] = [{name: child.metric_state for name, child in modules if isinstance(child, Metric)}]
        if trainer.world_size > 1:
            metrics *= trainer.world_size
            torch.distributed.all_gather_object(metrics, metrics[0])
        resume: dict[str, Any] = {"metrics": metrics, "callback_metrics": dict(trainer.callback_metrics)}
        resume |= {"should_stop": trainer.should_stop, "run_folder": os.path.realpath(trainer.default_root_dir)}
        checkpoint["resume"] = resume
        if self.loader_states:  # those in the checkpoint are one batch ahead
            checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"] = self.loader_states

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.resumed = resumed = checkpoint["resume"]
        if (processes := len(resumed["metrics"])) != trainer.world_size:
            raise UserError(f"trainer.devices: the run has {processes} processes; resume it with as many")
        trainer.num_sanity_val_steps = 0  # it would reset the metrics
        self.loader_states = checkpoint["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
        folder = os.path.realpath(trainer.default_root_dir)
        checkpoint["callbacks"] = _move_paths(checkpoint["callbacks"], resumed["run_folder"], folder)
        self.saved_step = checkpoint["global_step"]
        self.last_good = f"the last good checkpoint is {self.folder / LAST} (step {self.saved_step})"

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.resumed:
            resumed, modules = move_data_to_device(self.resumed, pl_module.device), dict(pl_module.named_modules())
            trainer.should_stop = resumed["should_stop"]
            trainer.callback_metrics.update(resumed["callback_metrics"])
            for name, states in resumed["metrics"][trainer.global_rank].items():
                for state, value in states.items():
                    setattr(modules[name], state, value)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loader_states = get_loader_states(trainer)
        if isinstance(outputs, dict) and isinstance(loss := outputs.get("loss"), torch.Tensor):
            moment = f"step {trainer.global_step} (epoch {trainer.current_epoch + 1}, batch {batch_idx + 1})"
            self.losses.append((moment, loss))
        if len(self.losses) >= trainer.log_every_n_steps or trainer.is_last_batch:  # type: ignore[attr-defined]
            self._check_losses(trainer)  # not after every step, because it waits for the GPU

    def _check_losses(self, trainer: L.Trainer) -> None:
        losses, self.losses = self.losses, []
        if losses:
            sums: Any = trainer.strategy.reduce(torch.stack([loss for _, loss in losses]), reduce_op="sum")
            for (moment, _), loss in zip(losses, sums.tolist(), strict=True):
                if not math.isfinite(loss):
                    self._fail(trainer, f"the loss is {loss} at {moment}")

    def _fail(self, trainer: L.Trainer, reason: str) -> NoReturn:
        if not trainer.is_global_zero:
            raise SystemExit(2)
        fix = "try a lower optimizer.lr, or trainer.gradient_clip_val=1"
        raise DivergenceError(f"{reason}; {self.last_good}; {fix}")


def _move_paths(value: Any, old: str, new: str) -> Any:
    """Replace the folder `old` by `new` in the keys and values of callbacks' states, which name absolute paths."""
    if isinstance(value, dict):
        return {_move_paths(key, old, new): _move_paths(item, old, new) for key, item in value.items()}
    return new + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value
