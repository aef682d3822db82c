"""What lets a run be stopped at any moment and continue as if nothing had happened."""

import os
import signal
import sys
import threading
import warnings
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from torch import Tensor
from torchmetrics import Metric

from src.core.compat import (
    disable_sigterm_broadcast,
    get_loader_states,
    mark_as_not_restarting,
    mark_between_batches,
    restart_dataloader,
)
from src.core.errors import DivergenceError, UserError
from src.core.value_types import PositiveFloat, PositiveInt
from src.data.sampler import find_batch_sampler
from src.training.checkpoints import BEFORE, LAST


class ResumeCheckpoint(Checkpoint):
    """Writes last.ckpt between two batches every `every_minutes`, every `every_steps`, on a signal and at the end.

    The checkpoint before it stays as previous.ckpt. Beside Lightning's own state it holds what that lacks: random
    number generators and running scores of every process, and the latest metrics. SIGINT and SIGTERM raise
    SystemExit with 128 + the signal's number once the checkpoint is written; a second one raises it at once.
    SIGUSR2, where somebody has a handler for it, as submitit has to put the job into the queue again, is passed on.
    A loss or a weight that is not finite raises Diverged, at the latest after `log_every_n_steps` steps. As often
    several processes agree on a checkpoint or a stop that a clock or a signal asks for.
    """

    def __init__(
        self, dirpath: str, every_minutes: PositiveFloat | None = 1.0, every_steps: PositiveInt | None = None
    ) -> None:
        self.folder = Path(dirpath)
        self.every_minutes, self.every_steps = every_minutes, every_steps
        self.signal = 0
        self.restored: dict[str, Any] | None = None
        self.losses: list[tuple[int, int, int, Tensor]] = []  # step, epoch, batch, loss; looked at now and then
        self.loaders: list[dict[str, Any]] = []  # where they were at the end of a batch, if they can tell
        self.between_batches = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False  # the batch script requeues, and nobody else
        if trainer.world_size > 1:
            pass

    # Saving

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saved_at, self.saved_step = monotonic(), trainer.global_step
        self.saved = self.folder / LAST if self.restored else None
        if threading.current_thread() is threading.main_thread():
            # After Lightning's own handlers, which end with exit code 0, and which it puts back at the end.
            requeue = getattr(signal, "SIGUSR2", None)
            passed_on = [requeue] if requeue and callable(signal.getsignal(requeue)) else []
            numbers = signal.SIGINT, signal.SIGTERM, *passed_on
            self.handlers: dict[int, Any] = {number: signal.signal(number, self._note) for number in numbers}
            disable_sigterm_broadcast(trainer)
        if self.restored:
            batches = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            order = find_batch_sampler(trainer.train_dataloader)
            if order:
                order.set_epoch(trainer.current_epoch)
                order.skip(batches)
            told = restart_dataloader(trainer, always=order is not None)
            if batches and not told and not order:
                warnings.warn(
                    "the training DataLoader cannot tell where it was: the rest of this epoch is drawn anew "
                    f"after its {batches} batches; torchdata's StatefulDataLoader can",
                    stacklevel=2,
                )

    def _note(self, number: int, frame: object) -> None:
        if self.signal:
            self._leave(number)
        self.signal = number

    def _leave(self, number: int) -> NoReturn:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number](number, None)  # raises SystemExit in the process that requeues
            raise SystemExit  # and does nothing in the others
        raise SystemExit(128 + number)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.restored:
            self._restore(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches:  # gradients are no part of a checkpoint
            return
        minutes, steps = (monotonic() - self.saved_at) / 60, trainer.global_step - self.saved_step
        late = self.every_minutes is not None and minutes >= self.every_minutes
        wish = self._agreed(trainer, self.signal or int(late))
        if wish or (self.every_steps is not None and steps >= self.every_steps):
            self._save(trainer, between_batches=True)
        if wish > 1:
            self._leave(wish)

    def _agreed(self, trainer: L.Trainer, wish: int, always: bool = False) -> int:
        """The clocks of several processes differ, and a signal may reach one alone; to ask the others is to wait."""
        if trainer.world_size == 1:
            return wish
        if trainer.global_step % trainer.log_every_n_steps and not always:  # type: ignore[attr-defined]
            return 0
        device = trainer.strategy.root_device
        return int(trainer.strategy.reduce(torch.tensor(wish, device=device), reduce_op="max"))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer, between_batches=False)
        if wish := self._agreed(trainer, self.signal, always=True):
            self._leave(wish)

    def _save(self, trainer: L.Trainer, between_batches: bool) -> None:
        self._check_losses(trainer)
        weights = [weight.isfinite().all() for weight in trainer.lightning_module.parameters()]
        if weights and not torch.stack(weights).all():
            self._fail(trainer, f"a weight is not finite after step {trainer.global_step}")
        for logger in trainer.loggers:
            logger.save()  # what was logged before the checkpoint is on the disk before it
        self.between_batches = between_batches
        beside = self.folder / "next.ckpt"
        trainer.save_checkpoint(beside)
        self.between_batches = False
        self.saved = self.folder / LAST
        if trainer.is_global_zero:
            if self.saved.exists():
                os.replace(self.saved, self.folder / BEFORE)
            os.replace(beside, self.saved)
        self.saved_at, self.saved_step = monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        device = pl_module.device.type
        own = {
            "random": torch.get_rng_state(),
            "threads": torch.get_num_threads(),
            "device": device,
            "random_device": torch.get_device_module(device).get_rng_state() if device != "cpu" else None,
            "scores": {
                name: {state: torch.as_tensor(value).cpu().clone() for state, value in metric.metric_state.items()}
                for name, metric in _metrics(pl_module)
            },
        }
        ranks: list[Any] = [own]
        if trainer.world_size > 1:
            ranks = [None] * trainer.world_size
            torch.distributed.all_gather_object(ranks, own)
        metrics = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
        checkpoint["recovery"] = {"ranks": ranks, "metrics": metrics}
        if self.between_batches:
            mark_between_batches(trainer, checkpoint, self.loaders)

    # Loading

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.restored = checkpoint["recovery"]
        here = str(self.folder)
        for state in checkpoint["callbacks"].values():  # ModelCheckpoint's paths, of where the folder was then
            there = str(state.get("dirpath")) if isinstance(state, dict) else ""
            if there:
                state.update(_moved(state, there, here))
            if isinstance(state, dict) and "best_model_path" in state:
                _check_paths(state, Path(state["dirpath"] if there else here).resolve())

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.restored:
            metrics = self.restored["metrics"]
            trainer.callback_metrics.update({name: value.to(pl_module.device) for name, value in metrics.items()})

    def _restore(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self.restored is not None
        ranks, self.restored = self.restored["ranks"], None
        if len(ranks) != trainer.world_size:
            raise UserError(f"the run has {len(ranks)} processes; continue it with as many")
        progress = trainer.fit_loop.epoch_loop.batch_progress.total
        progress.ready = progress.completed + 1  # the batch that is about to start was counted before the stop as well
        own = ranks[trainer.global_rank]
        for name, metric in _metrics(pl_module):
            for state, value in own["scores"][name].items():
                setattr(metric, state, value.to(pl_module.device))
        if own["random_device"] is not None and own["device"] == pl_module.device.type:
            torch.get_device_module(own["device"]).set_rng_state(own["random_device"])
        torch.set_rng_state(own["random"])
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(own["threads"])  # sums are added up in as many parts as before
        mark_as_not_restarting(trainer)

    # Faults

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.loaders = get_loader_states(trainer)
        if not isinstance(outputs, dict) or not isinstance(outputs.get("loss"), Tensor):
            return  # a module that optimizes by itself
        self.losses.append((trainer.global_step, trainer.current_epoch, batch_idx, outputs["loss"]))
        # Not after every step: to look at a number is to wait for the GPU.
        if len(self.losses) >= trainer.log_every_n_steps or trainer.is_last_batch:  # type: ignore[attr-defined]
            self._check_losses(trainer)

    def _check_losses(self, trainer: L.Trainer) -> None:
        if not self.losses:
            return
        where, self.losses = self.losses, []
        losses = trainer.strategy.reduce(torch.stack([loss for *_, loss in where]), reduce_op="sum")
        for (step, epoch, batch, _), loss in zip(where, losses.tolist(), strict=True):  # type: ignore[union-attr]
            if loss - loss != 0:  # NaN or infinite
                self._fail(trainer, f"the loss is {loss} at step {step} (epoch {epoch + 1}, batch {batch + 1})")

    def _fail(self, trainer: L.Trainer, what: str) -> None:
        if not trainer.is_global_zero:
            sys.exit(2)
        good = (
            f"the last good checkpoint is {self.saved} (step {self.saved_step})" if self.saved else "no checkpoint yet"
        )
        raise DivergenceError(f"{what}; {good}; try a lower optimizer.lr, or trainer.gradient_clip_val=1")


def _metrics(module: L.LightningModule) -> list[tuple[str, Metric]]:
    return [(name, part) for name, part in module.named_modules() if isinstance(part, Metric)]


def _check_paths(value: Any, folder: Path) -> None:
    """Raises UserError for a path that leads out of `folder`: Lightning deletes what is no longer the best there."""
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        for each in value:
            _check_paths(each, folder)
    elif isinstance(value, str):
        place = Path(value)
        leads = place.is_absolute() or ".." in place.parts
        if "://" in value or "::" in value or (leads and not place.resolve().is_relative_to(folder)):
            raise UserError(f"the checkpoint names {value}, which is not in {folder}; start the run again")


def _moved(value: Any, there: str, here: str) -> Any:
    """Plain values with every path below `there` as one below `here`."""
    if isinstance(value, dict):
        return {_moved(key, there, here): _moved(each, there, here) for key, each in value.items()}
    return here + value[len(there) :] if isinstance(value, str) and value.startswith(there) else value
