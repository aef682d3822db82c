"""Stop a run at any moment and resume it with bitwise identical results."""

import csv
import math
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.utilities import move_data_to_device, rank_zero_warn
from lightning.pytorch.callbacks import Checkpoint, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torchmetrics import Metric

from src.core import compat
from src.core.errors import DivergenceError, UserError
from src.core.value_types import PositiveFloat, PositiveInt
from src.data.sampler import hash_seed
from src.training.checkpoints import LAST, PREVIOUS, is_finite, load_weights_only


def find_resume_checkpoint(trainer: Trainer) -> Path | None:
    """Return the newest undamaged checkpoint or None, and warn of damaged ones. Raise UserError if all are damaged.

    Remove from the loggers' files what will be logged again.
    """
    checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ResumeCheckpoint)]
    files = [callback.file.with_name(name) for callback in checkpoints for name in (LAST, PREVIOUS)]
    files = [file for file in files if file.exists()]
    for file in files:
        try:
            content = load_weights_only(file)
        except UserError as error:
            print(f"warning: {error}", file=sys.stderr)
            continue
        is_longer = content["resume"]["stopping_criteria"][:2] != compat.get_stopping_criteria(trainer)[:2]
        if is_longer and any({"total_steps", "T_max"} & schedule.keys() for schedule in content["lr_schedulers"]):
            fix = f"leave them out, or start a new run: init_from={os.path.relpath(file)} instead of resume"
            raise UserError(f"trainer.max_epochs, max_steps: the schedule has a fixed length; {fix}")
        _drop_later_records(trainer, content["resume"]["log_step"])
        callbacks: Any = trainer.callbacks  # type: ignore[attr-defined]
        # The state of the optimizer has the rate that was found.
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, LearningRateFinder)]
        return file
    if files:
        raise UserError(f"resume={files[0].parent}: all checkpoints are damaged; start again in another folder")
    _drop_later_records(trainer, 0)
    return None


def _drop_later_records(trainer: Trainer, step: int) -> None:
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            for writer in [logger.experiment.file_writer] * 2:  # a reader of TensorBoard ignores the first start
                writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        elif isinstance(logger, CSVLogger) and (file := Path(logger.log_dir, "metrics.csv")).is_file():
            rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
            rows = [{key: value for key, value in row.items() if value} for row in rows]
            # Lightning deletes the file when it begins an experiment, here.
            logger.experiment.metrics.extend(row for row in rows if int(row["step"]) < step)
            logger.save()


class ResumeCheckpoint(Checkpoint):
    """Seed the random generators before each batch; write last.ckpt regularly, on a signal and at the end.

    It is written where a batch starts: from one that is written at the end of an epoch's last batch, Lightning would
    resume without this epoch's validation. Each batch has a seed, so no generator's state is saved. SIGINT and SIGTERM
    raise SystemExit with 128 + their number after a checkpoint, a second signal at once. SIGUSR1 and SIGUSR2 are passed
    on to a handler that requeues the job.
    Every `log_every_n_steps`, processes agree to save or stop, and a loss that is not finite raises DivergenceError.
    """

    def __init__(
        self, dirpath: str, every_minutes: PositiveFloat | None = 1.0, every_steps: PositiveInt | None = None
    ) -> None:
        self.file, self.seed = Path(dirpath).resolve() / LAST, torch.initial_seed()
        self.minutes, self.steps = every_minutes or math.inf, every_steps or math.inf
        self.signal, self.handlers = 0, dict[int, Any]()
        self.saved_at, self.saved_step = monotonic(), 0  # 0: no checkpoint yet
        self.resumed: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with suppress(ValueError):  # Python installs handlers in the main thread only
            for number in (getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")):
                if number and callable(signal.getsignal(number)):  # Lightning restores it after the training
                    self.handlers[number] = signal.signal(number, self._handle_signal)
        epoch, epoch_loop = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop
        if self.resumed:
            if epoch.completed == epoch.ready:  # the run was finished, and trains longer
                epoch_loop.restarting = False
                epoch_loop.batch_progress.reset_on_run()
            compat.restart_at_next_batch(trainer)
        batches = epoch_loop.batch_progress.current.completed
        self._seed_generators(trainer, pl_module, batches)  # as where the epoch began
        compat.begin_dataloaders(trainer)
        if not trainer.current_epoch:  # Lightning begins them before on_train_epoch_start in the first epoch only
            self._seed_generators(trainer, pl_module, batches)
        compat.skip_batches(trainer, batches)

    def _handle_signal(self, number: int, frame: object) -> None:
        if self.signal:
            self._exit(number)
        self.signal = number

    def _exit(self, number: int) -> NoReturn:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.handlers[number](number, None)  # exits in the process that requeues the job
        raise SystemExit(128 + number)

    def _seed_generators(self, trainer: Trainer, pl_module: LightningModule, ago: int = 0) -> None:
        batch = trainer.fit_loop.epoch_loop.batch_progress.total.completed - ago
        seed = hash_seed(self.seed, batch, trainer.global_rank, 1)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.4 ms if CUDA is not in use
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(seed)

    on_train_epoch_start = on_test_start = _seed_generators  # DataLoaders may shuffle by it, networks may draw

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._seed_generators(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches:  # a checkpoint does not hold gradients
            return
        request = self.signal or int(monotonic() - self.saved_at >= 60 * self.minutes)
        if trainer.world_size > 1:  # processes that compare wait for each other
            should_compare = trainer.global_step % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
            request = self._reduce_max(trainer, request) if should_compare else 0
        if request or trainer.global_step - self.saved_step >= self.steps:
            self._save(trainer)
        if request > 1:
            self._exit(request)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)
        if request := self._reduce_max(trainer, self.signal):
            self._exit(request)

    def _reduce_max(self, trainer: Trainer, request: int) -> int:
        """Return the highest request of all processes."""
        tensor = torch.tensor(int(request), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(tensor, reduce_op="max"))

    def _save(self, trainer: Trainer) -> None:
        if not is_finite(dict(trainer.lightning_module.named_parameters())):
            raise self._describe_divergence(f"a weight is not finite after step {trainer.global_step}")
        for logger in trainer.loggers:
            logger.save()  # first, because what precedes the checkpoint is not logged again
        trainer.save_checkpoint(self.file)
        self.saved_at, self.saved_step = monotonic(), trainer.global_step

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        states = {name: module.metric_state for name, module in pl_module.named_modules() if isinstance(module, Metric)}
        metrics: list[Any] = [states] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(metrics, states)
        checkpoint["resume"] = {
            "metrics": metrics,
            "callback_metrics": dict(trainer.callback_metrics),
            "should_stop": trainer.should_stop,
            "stopping_criteria": compat.get_stopping_criteria(trainer),
            "log_step": compat.get_log_step(trainer),
            "run_folder": str(self.file.parents[1]),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        resumed = self.resumed = checkpoint["resume"]
        if (processes := len(resumed["metrics"])) != trainer.world_size:
            raise UserError(f"trainer.devices: the run has {processes} processes; resume it with as many")
        self.saved_step = checkpoint["global_step"]
        for callback in trainer.early_stopping_callbacks:  # their states would undo a change of patience
            checkpoint["callbacks"].get(callback.state_key, {})["patience"] = callback.patience
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)  # each epoch is begun anew
        folder = str(self.file.parents[1])
        checkpoint["callbacks"] = _move_paths(checkpoint["callbacks"], resumed.get("run_folder", folder), folder)
        for key, state in [*checkpoint["callbacks"].items()]:
            try:
                if file := state.get("best_model_path"):  # of ModelCheckpoint
                    load_weights_only(Path(file))
            except UserError as error:
                rank_zero_warn(f"{error}; the best of the remaining epochs takes its place")
                del checkpoint["callbacks"][key]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compat.disable_requeue_and_broadcast(trainer)
        if self.resumed:
            if self.resumed["stopping_criteria"] == compat.get_stopping_criteria(trainer):
                trainer.should_stop |= self.resumed["should_stop"]
            trainer.num_sanity_val_steps = 0  # they would reset metrics
            resumed, modules = move_data_to_device(self.resumed, pl_module.device), dict(pl_module.named_modules())
            trainer.callback_metrics.update(resumed["callback_metrics"])
            for name, states in resumed["metrics"][trainer.global_rank].items():
                for state, value in states.items():
                    setattr(modules[name], state, value)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not after every step, because it waits for the GPU; a run does not recover from such a loss.
        if (batch_idx + 1) % trainer.log_every_n_steps == 0 or trainer.is_last_batch:  # type: ignore[attr-defined]
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            if self._reduce_max(trainer, isinstance(loss, torch.Tensor) and not is_finite({"loss": loss})):
                moment = f"step {trainer.global_step} (epoch {trainer.current_epoch + 1}, batch {batch_idx + 1})"
                raise self._describe_divergence(f"the loss is not finite at {moment}")

    def _describe_divergence(self, reason: str) -> DivergenceError:
        good = f"last good checkpoint: {self.file} (step {self.saved_step})" if self.saved_step else "no checkpoint yet"
        return DivergenceError(f"{reason}; {good}; try a lower optimizer.lr, or trainer.gradient_clip_val=1")


def _move_paths(value: Any, old: str, new: str) -> Any:  # keys and values of ModelCheckpoint's state are paths
    if isinstance(value, dict):
        return {_move_paths(key, old, new): _move_paths(item, old, new) for key, item in value.items()}
    return new + value[len(old) :] if isinstance(value, str) and value.startswith(old) else value
