"""What a run prints: the layer table, progress, the final scores."""

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

IRRELEVANT_WARNINGS = (
    ".*does not have many workers",  # the images are in memory
    ".*have no `val_dataloader`",
    ".*across ranks is zero",  # data.val_size=0
    ".*set_vital",  # torchdata's
    ".*treespec, LeafSpec",
    ".*is smaller than the logging interval",
    ".*`srun` command is available",  # a run need not be a job of Slurm
    ".*sync_dist=True.* in distributed setting",  # torchmetrics sums before logging
    "Grad strides do not match bucket view strides",  # channels_last; no result changes
    "The AccumulateGrad node's stream does not match",
    ".*exists and is not empty",  # a resumed run
    ".*your dataloader is not resumable",  # ResumeCheckpoint sets its position
)


def silence_routine_output() -> None:
    """Silence routine Lightning output and warnings that do not apply here."""
    for package in "lightning", "lightning.pytorch", "lightning.fabric":
        logger = logging.getLogger(package)
        logger.handlers.clear()  # messages go through Hydra's handlers, to the terminal and the run's log
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler=… asks for a report
    print_warnings_in_one_line()
    for message in IRRELEVANT_WARNINGS:
        warnings.filterwarnings("ignore", message=message)


def get_launcher_name() -> str | None:
    """Return the launcher of the sweep or study that this run belongs to, None for a single run."""
    is_multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    return str(HydraConfig.get().launcher._target_).rpartition(".")[2] if is_multirun else None


def _is_verbose() -> bool:
    """Return whether this run prints: alone, or into a log of its own. src.sweeps.progress reports the others."""
    return get_launcher_name() in (None, "SlurmLauncher", "LocalLauncher")


class LayerTable(Callback):
    """Print torchinfo's table of layers, output shapes and parameters, and write it to layers.txt."""

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
        text = re.sub(r"Units\.(\w)\w*", r"\1", str(table))  # torchinfo prints the member of an Enum
        if _is_verbose():
            print(text)
        Path(trainer.default_root_dir, "layers.txt").write_text(f"{text}\n", encoding="utf-8")


def make_bar(total: float | None, is_enabled: bool = True) -> Progress:
    """Return a progress bar that disappears when it stops, and is shown on the terminal of a single process only."""
    end: list[Any] = [TimeElapsedColumn()]
    if total is not None:
        end = [TaskProgressColumn(), TimeRemainingColumn(compact=True), TextColumn("left")]
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        *end,
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=600,  # seconds, so that validation counts as part of an epoch
        disable=not (is_enabled and sys.stdout.isatty() and get_launcher_name() in (None, "BasicLauncher")),
    )


def make_progress_bar() -> ProgressBar:
    """Return the progress callback of conf/callbacks/default.yaml."""
    return RunProgressBar()


class RunProgressBar(ProgressBar):
    """Show one bar for the whole run on a terminal, and print one line per finished epoch everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled, self.bar, self.updated_at, self.epoch = True, make_bar(None, False), 0.0, 0

    def disable(self) -> None:  # Lightning calls it on all processes but the first
        self.is_enabled = False

    def _start(self, description: str, total: float, completed: int = 0) -> None:
        steps = total if math.isfinite(total) else None
        self.bar = make_bar(steps, self.is_enabled)
        self.task = self.bar.add_task(description, total=steps, completed=completed)
        self.bar.start()

    def _describe(self, suffix: str = "") -> None:
        if self.bar.tasks:
            has_number = get_launcher_name() and not OmegaConf.is_missing(HydraConfig.get().job, "num")
            job = f"job {HydraConfig.get().job.num + 1}, " if has_number else ""
            self.bar.update(self.task, description=f"{job}{self._format_epoch(1)}{suffix}")

    def _format_epoch(self, offset: int = 0) -> str:
        total = "" if self.trainer.max_epochs in (None, -1) else f"/{self.trainer.max_epochs}"
        return f"epoch {self.trainer.current_epoch + offset}{total}"

    def _print_epoch(self, trainer: L.Trainer) -> None:
        scores: dict[str, list[str]] = {}
        for name, value in sorted(trainer.progress_bar_metrics.items()):
            stage, _, score = name.rpartition("/")
            scores.setdefault(stage, []).append(f"{score} {format_metric(name, float(value)):<6}")  # type: ignore[arg-type]
        scores.pop("v_num", None)
        if self.is_enabled and _is_verbose():
            stages = [" ".join([stage, *values]).lstrip() for stage, values in scores.items()]
            print("  ".join([self._format_epoch(), *stages]).rstrip(), flush=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch = trainer.current_epoch  # the last one that has its line
        epochs, steps = (math.inf if n in (None, -1) else n for n in (trainer.max_epochs, trainer.max_steps))
        total = min(epochs * trainer.num_training_batches, steps * trainer.accumulate_grad_batches)
        self._start(self._format_epoch(1), total, trainer.fit_loop.epoch_loop.batch_progress.total.completed)

    # The module logs its training scores after the callbacks' own end of the epoch, so an epoch's line waits for the
    # next epoch or the end.
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.current_epoch > self.epoch:
            self._print_epoch(trainer)
        self.epoch = trainer.current_epoch
        self._describe()

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        if monotonic() - self.updated_at > 0.25 and self.bar.tasks:
            self.updated_at = monotonic()
            self.bar.update(self.task, completed=trainer.fit_loop.epoch_loop.batch_progress.total.completed)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe(", validation")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._describe()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.stop()
        if trainer.current_epoch > self.epoch:
            self._print_epoch(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start("test", sum(trainer.num_test_batches))

    def on_test_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.bar.advance(self.task)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.bar.stop()


def print_results(results: dict[str, Any], folder: Path, is_image_model: bool) -> None:
    """Print the final scores, as a panel on a terminal, and what to run next."""
    if not _is_verbose():
        return
    title = f"{results['data']}, {results['parameters']:,} parameters, epoch {results['epochs']}"
    scores = {name: value for name, value in results["metrics"].items() if "/" in name and not name.endswith("_step")}
    width = max(map(len, scores), default=0)
    lines = [f"{name:<{width}}  {format_metric(name, value, digits=4)}" for name, value in scores.items()]
    if sys.stdout.isatty():
        Console().print(Panel("\n".join(lines), title=title, expand=False, highlight=True))
    else:
        print(title, *lines, sep="\n")
    path = shlex.quote(os.path.relpath(folder))
    commands = [f"python -m src.{program} {path}" for program in ("evaluate", "draw") if is_image_model]
    commands += [f"tensorboard --logdir {path}"] if list(folder.glob("events.out.tfevents.*")) else []
    print(f"folder  {path}", *(f"next    {command}" for command in commands), sep="\n", flush=True)
