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
from tqdm import tqdm

from src.core.errors import format_metric, print_warnings_in_one_line

IRRELEVANT_WARNINGS = (
    ".*does not have many workers",  # the images are in memory
    ".*`list` across ranks is zero",  # data.val_size=0
    ".*is not supported by the model summary",  # trainer.precision=bf16-mixed
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


def is_verbose() -> bool:
    """Return whether this run prints: alone, or into a log of its own. src.sweeps.callback reports the others."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return True
    return "submitit" in HydraConfig.get().launcher._target_


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
    lines = [f"{name:<18}  {kind:<20}  {size!s:<20}  {count:>10,}" for name, kind, size, count in layers]
    return "\n".join([f"{'layer':<18}  {'type':<20}  {'output':<20}  parameters", *lines])


class RunProgressBar(ProgressBar):
    """Print a line about the run and one per epoch; on a terminal, show a bar of the run with the time left."""

    bar: Any = tqdm(disable=True)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.epoch, self.started_at = trainer.current_epoch, perf_counter()
        self.is_printing = trainer.is_global_zero and is_verbose()
        if self.is_printing:
            print(_format_header(trainer), flush=True)
            batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
            begun = trainer.fit_loop.total_batch_idx + 1
            self.bar = tqdm(total=batches, initial=begun, file=sys.stdout, leave=False, disable=None, delay=0.1)

    def disable(self) -> None:
        """Do nothing: further processes, for which Lightning calls this, have no bar. LearningRateFinder calls both."""

    enable = disable

    def on_train_batch_end(self, *arguments: Any) -> None:
        self.bar.update()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bar.close()
        self._print_epoch(trainer, pl_module)

    def on_exception(self, *arguments: Any) -> None:
        self.bar.close()

    def _print_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.epoch or not self.is_printing:
            return
        self.epoch, seconds, self.started_at = trainer.current_epoch, perf_counter() - self.started_at, perf_counter()
        stages: dict[str, str] = {}
        for name, value in sorted(trainer.progress_bar_metrics.items()):
            stage, _, score = name.rpartition("/")
            if name != "v_num":
                stages[stage] = f"{stages.get(stage, stage)} {score} {format_metric(name, float(value)):<6}"  # type: ignore[arg-type]
        total = str(trainer.max_epochs)
        epoch = f"epoch {self.epoch:>{len(total)}}/{total}".removesuffix("/-1")
        self.bar.clear()
        print(epoch, *stages.values(), f"{seconds:7.1f} s", sep="  ", flush=True)

    # The module logs its training scores after the callbacks' own end of the epoch, so an epoch's line waits for the
    # next epoch or the end.
    on_train_epoch_start = _print_epoch


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
    rows = {name: format_metric(name, x, digits=4) for name, x in scores.items() if not name.endswith("_step")}
    rows["time"] = f"{results['seconds']['fit']:.1f} s"
    if speed := results["samples_per_second"]:
        rows["time"] += f", {speed:,.0f} samples/s"
    rows["folder"] = path
    if any(name.startswith("test/") for name in scores):
        rows["next"] = f"python -m src.evaluate {path}"
    print(f"{results['data']}, {results['parameters']:,} parameters, epoch {results['epochs']}")
    print(*(f"{name:<11}  {value}" for name, value in rows.items()), sep="\n", flush=True)
