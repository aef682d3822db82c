"""What a run of the backprop experiment leaves: the worked sheet, its losses, the first step with its numbers."""

import csv
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from src.backprop.formulas import worked_step
from src.backprop.network import COLUMNS, BackpropModule


class TraceCallback(Callback):
    """Writes trace.csv, a row a step, and losses.png, and prints what they say in short.

    The first step, worked out, goes into TensorBoard's Text tab.
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
        from src.backprop import plots  # here, because Matplotlib takes its time

        assert isinstance(pl_module, BackpropModule)
        folder, losses = Path(trainer.default_root_dir), [row["E_total"] for row in self.rows]
        with (folder / "trace.csv").open("w", newline="") as file:
            sheet = csv.DictWriter(file, ["step", *COLUMNS], lineterminator="\n")
            sheet.writeheader()
            sheet.writerows({"step": step, **row} for step, row in enumerate(self.rows, start=1))
        plots.save(plots.all_losses({f"{self.first_lr:g}": losses}), folder / "losses.png")
        print(f"η = {self.first_lr:g}: loss 1 is {losses[0]:.8e}, loss {len(losses)} is {losses[-1]:.8e}")
        print("trace.csv has every number of every step, losses.png the curve")
        text = worked_step(self.rows[0], self.first_lr, pl_module.gradients)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("first_step", text)
