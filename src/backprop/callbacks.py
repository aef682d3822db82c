"""Write the results of a backprop run (TraceCallback) and of a sweep (SweepReport)."""

import csv
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import rich
from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from rich.markdown import Markdown

from src.backprop.formulas import format_milestones, format_worked_step
from src.backprop.network import COLUMNS, BackpropModule
from src.core.run_folder import CONFIG_FILE

LESSON_RATE = 0.5


class TraceCallback(Callback):
    """Write trace.csv (one row per step) and losses.png, and print the first and last loss.

    The first step goes to TensorBoard's Text tab, with its formulas and numbers.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "first_lr": self.first_lr}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows, self.first_lr = state_dict["rows"], state_dict["first_lr"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.rows:
            self.first_lr = trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        assert isinstance(pl_module, BackpropModule)
        self.rows.append(pl_module.row)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from src.backprop import plots  # imported late: Matplotlib is slow

        assert isinstance(pl_module, BackpropModule)
        folder, losses = Path(trainer.default_root_dir), [row["E_total"] for row in self.rows]
        rows = [[step, *row.values()] for step, row in enumerate(self.rows, start=1)]
        _write_csv(folder / "trace.csv", [["step", *COLUMNS], *rows])
        plots.save_figure(plots.plot_curves({f"{self.first_lr:g}": losses}), folder / "losses.png")
        print(f"η = {self.first_lr:g}: loss 1 is {losses[0]:.8e}, loss {len(losses)} is {losses[-1]:.8e}")
        print("trace.csv lists every number of every step, losses.png plots the losses")
        text = format_worked_step(self.rows[0], self.first_lr, pl_module.gradients)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("first_step", text)


class SweepReport(HydraCallback):
    """After a sweep, write losses.csv, losses.md, plots and backprop.xlsx from trace.csv of its runs.

    Runs without trace.csv are left out.
    """

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from src.backprop import plots, workbook  # imported late: Hydra loads this module before the run starts

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
        table = format_milestones(losses)
        (folder / "losses.md").write_text(table)
        # The report of every sweep has a losses.png of its own.
        plots.save_figure(plots.plot_curves(losses), folder / "losses_by_lr.png")
        for name, values in losses.items():
            file = folder / f"loss_{'lr=' if only_lr_differs else ''}{name}.png"
            plots.save_figure(plots.plot_curves({name: values}), file)
        # The workbook starts with the learning rate of docs/backprop.md if a run has it.
        lr, _, gradients, rows = next((run for run in runs if run[0] == LESSON_RATE), runs[0])
        workbook.write_workbook(folder / "backprop.xlsx", rows, lr, gradients, losses)
        rich.print(Markdown(table))
        rich.print(f"report in {folder}")


def _write_csv(file: Path, rows: list[list[Any]]) -> None:
    with file.open("w", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)
