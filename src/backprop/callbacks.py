"""Write the results of a backprop run (TraceCallback) and of a sweep (SweepReport)."""

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf

from src.backprop.formulas import format_milestones, format_worked_step
from src.backprop.network import COLUMNS, BackpropModule
from src.core.run_folder import CONFIG_FILE


class TraceCallback(Callback):
    """Write trace.csv, losses.png and the worked first step (TensorBoard's Text tab); print the first and last loss."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from src.backprop.plots import plot_curves  # imported late: Matplotlib is slow
        from src.core.plots import save_figure

        assert isinstance(pl_module, BackpropModule)
        folder, rows = Path(trainer.default_root_dir), pl_module.rows
        losses, lr = [row["E_total"] for row in rows], rows[0]["η"]
        columns = [name for name in COLUMNS if name in rows[0]]
        table = [[step, *(row[name] for name in columns)] for step, row in enumerate(rows, start=1)]
        _write_csv(folder / "trace.csv", [["step", *columns], *table])
        save_figure(plot_curves({f"η = {lr:g}": losses}, title="The loss, step by step"), folder / "losses.png")
        print(f"η = {lr:g}: loss 1 is {losses[0]:.8e}, loss {len(losses)} is {losses[-1]:.8e}")
        print("trace.csv lists every number of every step, losses.png plots the losses")
        text = format_worked_step(rows[0], pl_module.gradients)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("first_step", text)


class SweepReport(HydraCallback):
    """After a sweep, write losses.csv, losses_by_lr.png and backprop.xlsx from those runs that have trace.csv."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from src.backprop import workbook  # imported late: Hydra loads this module before the run starts
        from src.backprop.plots import plot_curves
        from src.core.plots import save_figure

        folder, runs = Path(config.hydra.sweep.dir), []
        for file in folder.glob("*/trace.csv"):
            run = OmegaConf.load(file.parent / CONFIG_FILE)
            rows = np.atleast_1d(np.genfromtxt(file, delimiter=",", names=True))
            runs.append((run.optimizer.lr, file.parent.name, run.task.gradients, rows))
        if not runs:
            return
        runs.sort(key=lambda run: run[:2])
        only_lr_differs = len({lr for lr, *_ in runs}) == len(runs)
        losses = {str(lr) if only_lr_differs else name: rows["E_total"].tolist() for lr, name, _, rows in runs}

        steps = enumerate(zip_longest(*losses.values()), start=1)
        _write_csv(folder / "losses.csv", [["step", *losses], *([step, *values] for step, values in steps)])
        # The report of every sweep has a losses.png of its own.
        curves = {f"η = {name}" if only_lr_differs else name: values for name, values in losses.items()}
        save_figure(plot_curves(curves), folder / "losses_by_lr.png")
        # The workbook starts with the learning rate of docs/backprop.md, 0.5, if a run has it.
        lr, _, gradients, rows = next((run for run in runs if run[0] == 0.5), runs[0])
        with workbook.Workbook(folder / "backprop.xlsx", rows, losses) as book:
            book.write_all(lr, gradients)
        print(f"{format_milestones(losses)}report in {folder}")


def _write_csv(file: Path, rows: list[list[Any]]) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
