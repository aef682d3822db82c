"""What a run prints: the layer table, progress, the final scores."""

import logging
import os
import re
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import torchinfo
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from rich.console import Console
from rich.panel import Panel
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
        if is_verbose():
            print(text)
        Path(trainer.default_root_dir, "layers.txt").write_text(f"{text}\n", encoding="utf-8")


def make_progress_bar() -> ProgressBar:
    """Return the progress callback of conf/callbacks/default.yaml."""
    return RunProgressBar()


class RunProgressBar(RichProgressBar):
    """Lightning's bar for the current epoch, on a terminal only, and everywhere one line per finished epoch."""

    def __init__(self) -> None:
        is_shown = sys.stdout.isatty() and get_launcher_name() is None
        super().__init__(refresh_rate=10 if is_shown else 0, leave=False)
        self.is_first_process, self.last_epoch = True, 0

    def disable(self) -> None:  # Lightning calls it on all processes but the first
        super().disable()
        self.is_first_process = False

    def _init_progress(self, trainer: L.Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress:
            self.progress.live.transient = True  # Lightning leaves the last bar on the terminal

    def _get_train_description(self, current_epoch: int) -> str:
        return f"epoch {current_epoch + 1}"  # Lightning counts from 0

    def get_metrics(self, *arguments: Any) -> dict[str, Any]:
        return {}  # the epoch lines have them

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.last_epoch = trainer.current_epoch

    # The module logs its training scores after the callbacks' own end of the epoch, so an epoch's line waits for the
    # next epoch or the end.
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_epoch(trainer)
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_epoch(trainer)

    def _print_epoch(self, trainer: L.Trainer) -> None:
        if trainer.current_epoch == self.last_epoch:
            return
        self.last_epoch = trainer.current_epoch
        stages: dict[str, list[str]] = {}
        for name, value in sorted(trainer.progress_bar_metrics.items()):
            stage, _, score = name.rpartition("/")
            if name != "v_num":
                stages.setdefault(stage, []).append(f"{score} {format_metric(name, float(value)):<6}")  # type: ignore[arg-type]
        if self.is_first_process and is_verbose():
            total = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
            scores = [" ".join([stage, *values]).lstrip() for stage, values in stages.items()]
            print("  ".join([f"epoch {trainer.current_epoch}{total}", *scores]).rstrip(), flush=True)


def print_results(results: dict[str, Any], folder: Path, programs: Sequence[str]) -> None:
    """Print the final scores, as a panel on a terminal, and the commands of `programs`, which take the run."""
    if not is_verbose():
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
    commands = [f"python -m src.{program} {path}" for program in programs]
    commands += [f"tensorboard --logdir {path}"] if list(folder.glob("events.out.tfevents.*")) else []
    print(f"folder  {path}", *(f"next    {command}" for command in commands), sep="\n", flush=True)
