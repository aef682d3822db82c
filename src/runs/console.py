"""What a person sees while a run goes on: the layer table, progress, the scores at the end."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, cast

import lightning as L
import torchinfo
from lightning.pytorch.callbacks import Callback, ProgressBar, RichProgressBar
from rich.console import Console
from rich.panel import Panel
from torch import nn


def quiet() -> None:
    """Silences what Lightning says on every run and what does not apply to data that lies in memory."""
    for package in "lightning", "lightning.pytorch", "lightning.fabric":
        logger = logging.getLogger(package)
        logger.handlers.clear()  # what is said goes through Hydra, to the terminal and the run's log, once
        logger.propagate = True
        logger.setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # trainer.profiler=… asks for a report
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # not the library's line of code
    warnings.filterwarnings("ignore", message=".*does not have many workers")
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
            row_settings=("var_names",),
            device=pl_module.device,
            verbose=0,
        )
        print(table)
        Path(trainer.default_root_dir, "layers.txt").write_text(f"{table}\n")


def progress() -> ProgressBar:
    """Rich's bar on a terminal; elsewhere a line an epoch, without control codes."""
    return RichProgressBar(leave=True) if sys.stdout.isatty() else EpochLines()


class EpochLines(ProgressBar):
    def disable(self) -> None:  # Lightning calls it on every process but the first
        self._print = lambda trainer: None  # type: ignore[method-assign]

    def _print(self, trainer: L.Trainer) -> None:
        scores = sorted(trainer.progress_bar_metrics.items())
        parts = [f"{name} {value:.4f}" for name, value in scores if name != "v_num"]
        print(f"epoch {trainer.current_epoch}/{trainer.max_epochs}", *parts, sep="  ", flush=True)

    # The module logs its training scores after the callbacks' own end of the epoch, so the line waits for what
    # comes next: the following epoch or the end.
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        if trainer.callback_metrics and trainer.current_epoch:
            self._print(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        self._print(trainer)


def print_results(results: dict[str, Any], folder: Path) -> None:
    """A panel on a terminal, plain lines elsewhere; accuracies in percent."""
    title = f"{results['name']} on {results['data']}, {results['parameters']:,} parameters, epoch {results['epochs']}"
    rows = {
        name: f"{100 * value:.2f} %" if name.endswith("/acc") else f"{value:.4g}"
        for name, value in results["metrics"].items()
        if "/" in name and not name.endswith("_step")
    }
    rows["folder"] = os.path.relpath(folder)
    lines = [f"{name:<{max(map(len, rows))}}  {value}" for name, value in rows.items()]
    if sys.stdout.isatty():
        Console().print(Panel("\n".join(lines), title=title, expand=False, highlight=True))
    else:
        print(title, *lines, sep="\n", flush=True)
