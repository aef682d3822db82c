"""What a run of the backprop experiment leaves: the worked sheet, and the first step with its numbers."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from src.backprop.formulas import worked_step
from src.backprop.network import COLUMNS, BackpropModule


class Trace(Callback):
    """Writes trace.csv, a row a step, and puts the first step, worked out, into TensorBoard's Text tab."""

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
        assert isinstance(pl_module, BackpropModule)
        with Path(trainer.default_root_dir, "trace.csv").open("w", newline="") as file:
            sheet = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            sheet.writeheader()
            sheet.writerows(self.rows)
        text = worked_step(self.rows[0], self.first_lr, pl_module.gradients)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("first_step", text)
