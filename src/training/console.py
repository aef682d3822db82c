"""What a run prints: the layer table, progress, the final scores."""

import logging
import os
import shlex
import sys
import warnings
from collections.abc import Sized
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.utilities.model_summary import summarize
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn

from src.core.errors import format_metric, print_warnings_in_one_line

IRRELEVANT_WARNINGS = (
    ".*does not have many workers",  # the images are in memory
    ".*have no `val_dataloader`",
    ".*`list` across ranks is zero",  # data.val_size=0
    ".*is not supported by the model summary",  # trainer.precision=bf16-mixed
    ".*set_vital",  # torchdata's
    ".*treespec, LeafSpec",
    ".*is smaller than the logging interval",
    ".*`srun` command is available",  # a run need not be a job of Slurm
    ".*sync_dist=True.* in distributed setting",  # torchmetrics sums before logging
    "Grad strides do not match bucket view strides",  # channels_last; no result changes
    "The AccumulateGrad node's stream does not match",
    ".*exists and is not empty",  # a resumed run
    ".*callbacks used to create the checkpoint need to be provided",  # removed when a run was resumed
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


def is_verbose() -> bool:
    """Return whether this run prints: alone, or into a log of its own. src.sweeps.callback reports the others."""
    return get_launcher_name() in (None, "SlurmLauncher", "LocalLauncher")


class LayerTable(Callback):
    """Print the network and its blocks with output shapes and parameters; layers.txt has all layers."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        pl_module.example_input_array = trainer.precision_plugin.convert_input(pl_module.example_input_array)
        file = Path(trainer.default_root_dir, "layers.txt")
        file.write_text(f"{_format_layers(pl_module, max_depth=-1)}\n", encoding="utf-8")
        if is_verbose():
            print(_format_layers(pl_module, max_depth=2), flush=True)


def _format_layers(module: L.LightningModule, max_depth: int) -> str:
    """Format Lightning's summary with exact numbers, without metrics and what else the forward pass leaves out."""
    summary = summarize(module, max_depth)
    columns = summary.layer_names, summary.layer_types, summary.out_sizes, summary.param_nums
    layers = [layer for layer in zip(*columns, strict=True) if layer[2] != "?" or layer[3]]
    width = max(5, *(len(layer[0]) for layer in layers))
    lines = [f"{name:<{width}}  {kind:<20}  {size!s:<20}  {count:>10,}" for name, kind, size, count in layers]
    return "\n".join([f"{'layer':<{width}}  {'type':<20}  {'output':<20}  parameters", *lines])


class RunProgressBar(ProgressBar):
    """Print a line about the run and one per epoch; on a terminal, show a bar of the run with the time left."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch, self.started_at = trainer.current_epoch, perf_counter()
        self.is_printing = trainer.is_global_zero and is_verbose()
        if self.is_printing:
            print(_format_header(trainer), flush=True)
        by_epochs = (trainer.max_epochs or -1) * trainer.num_training_batches
        by_steps = trainer.max_steps * trainer.accumulate_grad_batches
        batches = min((limit for limit in (by_epochs, by_steps) if limit > 0), default=None)  # -1 is no limit
        columns = "{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), "left"
        is_shown = self.is_printing and sys.stdout.isatty() and get_launcher_name() is None
        self.bar = Progress(*columns, transient=True, disable=not is_shown)
        self.task = self.bar.add_task("", total=batches)
        self.bar.start()

    def enable(self) -> None:
        """Do nothing: what is printed depends on the process. LearningRateFinder and further processes call it."""

    disable = enable

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.bar.update(self.task, completed=trainer.fit_loop.total_batch_idx + 1)

    # The module logs its training scores after the callbacks' own end of the epoch, so an epoch's line waits for the
    # next epoch or the end.
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_epoch(trainer)
        self.bar.update(self.task, description=f"epoch {trainer.current_epoch + 1}")  # Lightning counts from 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_epoch(trainer)
        self.bar.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if hasattr(self, "bar"):
            self.bar.stop()

    def _print_epoch(self, trainer: L.Trainer) -> None:
        if trainer.current_epoch == self.epoch or not self.is_printing:
            return
        self.epoch, seconds, self.started_at = trainer.current_epoch, perf_counter() - self.started_at, perf_counter()
        stages: dict[str, list[str]] = {}
        for name, value in sorted(trainer.progress_bar_metrics.items()):
            stage, _, score = name.rpartition("/")
            if name != "v_num":
                stages.setdefault(stage, []).append(f"{score} {format_metric(name, float(value)):<6}")  # type: ignore[arg-type]
        scores = [" ".join([stage, *values]).lstrip() for stage, values in stages.items()]
        total = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        epoch = f"epoch {self.epoch:>{max(1, len(total) - 1)}}{total}"
        print(epoch, *scores, f"{seconds:7.1f} s", sep="  ", flush=True)


def _format_header(trainer: L.Trainer) -> str:
    """Return a line with the data, the hardware, the seed and the folder of a run."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    name = data.spec.name if hasattr(data, "spec") else type(data).__name__
    loaders = {"training": trainer.train_dataloader, "validation": trainer.val_dataloaders}
    sets = {part: getattr(loader, "dataset", None) for part, loader in loaders.items()}
    counts = [f"{len(items):,} {part}" for part, items in sets.items() if isinstance(items, Sized)]
    device, threads = trainer.strategy.root_device, torch.get_num_threads()
    hardware = f"{trainer.world_size} × {device.type}, {threads} thread{'s' * (threads > 1)}, {trainer.precision}"
    folder = os.path.relpath(trainer.default_root_dir)
    return f"{name}: {', '.join(counts)}; {hardware}; seed {os.environ.get('PL_GLOBAL_SEED')}; {folder}"


def print_results(results: dict[str, Any], folder: Path) -> None:
    """Print the final scores, the time, and what to run next."""
    if not is_verbose():
        return
    path, scores = shlex.quote(os.path.relpath(folder)), results["metrics"]
    shown = {name: value for name, value in scores.items() if "/" in name and not name.endswith("_step")}
    rows = {name: format_metric(name, value, digits=4) for name, value in shown.items()}
    rows["time"] = f"{results['seconds']['fit']:.1f} s, {results['samples_per_second']:,.0f} samples/s"
    rows["folder"] = path
    rows["next"] = f"tensorboard --logdir {shlex.quote(os.path.relpath(folder.parent))}"  # names the run
    if any(name.startswith("test/") for name in scores):
        rows["next"] = f"python -m src.evaluate {path}"
    print(f"{results['data']}, {results['parameters']:,} parameters, epoch {results['epochs']}")
    print(*(f"{name:<{max(map(len, rows))}}  {value}" for name, value in rows.items()), sep="\n", flush=True)
