"""What a person sees while a run goes on: the layer table, progress, the scores at the end."""

import logging
import math
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from time import monotonic
from typing import Any, cast

import lightning as L
import torchinfo
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, ProgressBar
from omegaconf import OmegaConf
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from src.core.errors import format_metric, print_warnings_in_one_line


def silence_routine_output() -> None:
    """Silences what Lightning says on every run and what does not apply to data that lies in memory."""
    for package in "lightning", "lightning.pytorch", "lightning.fabric":
        logger = logging.getLogger(package)
        logger.handlers.clear()  # what is said goes through Hydra, to the terminal and the run's log, once
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler=… asks for a report
    print_warnings_in_one_line()
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`")  # Record says what that has in consequence
    warnings.filterwarnings("ignore", message=".*set_vital")  # torchdata's
    warnings.filterwarnings("ignore", message=".*treespec, LeafSpec")
    warnings.filterwarnings("ignore", message=".*across ranks is zero")  # data.val_size=0
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval")
    warnings.filterwarnings("ignore", message=".*`srun` command is available")  # a run need not be a job of Slurm
    # With several processes: torchmetrics has added the scores up before they are logged.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.* in distributed setting")
    # The network's layout and Lightning's stream for DDP, which PyTorch remarks on; neither changes a result.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    warnings.filterwarnings("ignore", message="The AccumulateGrad node's stream does not match")
    # A resumed run: Recovery sets the loader's position.
    warnings.filterwarnings("ignore", message=".*exists and is not empty")
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")


def get_launcher_name() -> str | None:
    """What starts this run and others beside it, a sweep's or a study's; None for a run of its own."""
    several = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return str(HydraConfig.get().launcher._target_).rpartition(".")[2] if several else None


def _speaks() -> bool:
    """Whether a run tells of itself: alone, or into a file of its own. Of several, src.sweeps.progress does."""
    return get_launcher_name() in (None, "SlurmLauncher", "LocalLauncher")


class LayerTable(Callback):
    """Prints torchinfo's table of layers, output shapes and parameters; keeps it as layers.txt in the run folder."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        example = trainer.precision_plugin.convert_input(pl_module.example_input_array)
        table = torchinfo.summary(
            cast(nn.Module, getattr(pl_module, "net", pl_module)),
            input_data=example,
            col_names=("num_params",) if example is None else ("output_size", "num_params"),
            col_width=20,
            row_settings=("var_names",),
            device=pl_module.device,
            verbose=0,
        )
        text = re.sub(r"Units\.(\w)\w*", r"\1", str(table))  # as Python before 3.11 printed the member of an Enum
        if _speaks():
            print(text)
        Path(trainer.default_root_dir, "layers.txt").write_text(f"{text}\n")


def make_progress_bar() -> ProgressBar:
    return RunProgress()


def make_bar(total: float | None, enabled: bool = True) -> Progress:
    """A bar that is gone when it is stopped; nothing but on a terminal that this process has for itself."""
    end = [TimeElapsedColumn()] if total is None else [TaskProgressColumn(), TimeRemainingColumn(compact=True)]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),  # leaves room for the rest at 80 columns
        *end,
        *([] if total is None else [TextColumn("left")]),
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=600,  # seconds: validation, and a teacher's answers, belong to an epoch
        disable=not (enabled and sys.stdout.isatty() and get_launcher_name() in (None, "BasicLauncher")),
    )


class RunProgress(ProgressBar):
    """On a terminal one bar for the whole run, with the time left of it; everywhere a line for each finished epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        self.bar: Progress | None = None
        self.drawn = 0.0  # when

    def disable(self) -> None:  # Lightning calls it on every process but the first
        self.enabled = False

    def _start(self, description: str, total: float | None, completed: int = 0) -> None:
        self.bar = make_bar(total, self.enabled)
        self.task = self.bar.add_task(description, total=total, completed=completed)
        self.bar.start()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
        self.bar = None

    def _describe(self, more: str = "") -> None:
        if self.bar:
            counted = get_launcher_name() and not OmegaConf.is_missing(HydraConfig.get().job, "num")
            job = f"job {HydraConfig.get().job.num + 1}, " if counted else ""
            self.bar.update(self.task, description=f"{job}{_epoch(self.trainer, 1)}{more}")

    def _print(self, trainer: L.Trainer) -> None:
        parts: dict[str, list[str]] = {}
        for name, value in sorted(trainer.progress_bar_metrics.items()):
            stage, _, score = name.rpartition("/")
            parts.setdefault(stage, []).append(f"{score} {format_metric(name, float(value)):<6}")  # type: ignore[arg-type]
        parts.pop("v_num", None)
        if self.enabled and _speaks():
            told = [" ".join([stage, *scores]).lstrip() for stage, scores in parts.items()]
            print("  ".join([_epoch(trainer), *told]).rstrip(), flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epochs = trainer.current_epoch  # that have their line
        epochs, steps = (math.inf if n in (None, -1) else n for n in (trainer.max_epochs, trainer.max_steps))
        total = min(epochs * trainer.num_training_batches, steps * trainer.accumulate_grad_batches)
        done = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self._start(_epoch(trainer, 1), total if math.isfinite(total) else None, done)

    # The module logs its training scores after the callbacks' own end of the epoch, so the line waits for what
    # comes next: the following epoch or the end.
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch > self.epochs:
            self._print(trainer)
        self.epochs = trainer.current_epoch
        self._describe()

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if self.bar and monotonic() - self.drawn > 0.25:
            self.drawn = monotonic()
            self.bar.update(self.task, completed=trainer.fit_loop.epoch_loop.batch_progress.total.completed)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(", validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        if trainer.current_epoch > self.epochs:
            self._print(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        batches = sum(trainer.num_test_batches)
        self._start("test", batches if math.isfinite(batches) else None)

    def on_test_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if self.bar:
            self.bar.advance(self.task)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()


def _epoch(trainer: L.Trainer, further: int = 0) -> str:
    of = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
    return f"epoch {trainer.current_epoch + further}{of}"


def print_results(results: dict[str, Any], folder: Path, reads: bool) -> None:
    """A panel on a terminal, plain lines elsewhere, and what to do next, for a network that `reads` images."""
    if not _speaks():
        return
    title = f"{results['data']}, {results['parameters']:,} parameters, epoch {results['epochs']}"
    rows = {
        name: format_metric(name, value, digits=4)
        for name, value in results["metrics"].items()
        if "/" in name and not name.endswith("_step")
    }
    lines = [f"{name:<{max(map(len, rows), default=0)}}  {value}" for name, value in rows.items()]
    if sys.stdout.isatty():
        Console().print(Panel("\n".join(lines), title=title, expand=False, highlight=True))
    else:
        print(title, *lines, sep="\n")
    place = shlex.quote(os.path.relpath(folder))
    doors = [f"python -m src.{door} {place}" for door in ("evaluate", "draw") if reads]
    doors += [f"python -m src.dashboard {place}"] if list(folder.glob("events.out.tfevents.*")) else []
    print(f"folder  {place}", *(f"next    {command}" for command in doors), sep="\n", flush=True)
