"""Write the results of a backprop run (TraceCallback) and of a sweep (SweepReport)."""

import csv
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
from hydra.experimental.callback import Callback as HydraCallback
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig

from src.backprop.formulas import format_milestones, format_worked_step
from src.backprop.network import BackpropModule
from src.backprop.workbook import write_workbook


class TraceCallback(Callback):
    """Write trace.csv and the worked first step (TensorBoard's Text tab); print the first and last loss."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, BackpropModule)
        rows = pl_module.rows
        first, last = f"loss 1 is {rows[0]['E_total']:.8e}", f"loss {len(rows)} is {rows[-1]['E_total']:.8e}"
        print(f"η = {rows[0]['η']:g}: {first}, {last}; trace.csv has every number of every step")
        _write_csv(Path(trainer.default_root_dir, "trace.csv"), rows[0], (row.values() for row in rows))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("first_step", format_worked_step(rows[0]))


class SweepReport(HydraCallback):
    """After a sweep, write losses.csv and backprop.xlsx from the runs that have trace.csv."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        folder, traces = Path(config.hydra.sweep.dir), {}
        for file in folder.glob("*/trace.csv"):
            rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
            traces[file.parent.name] = [{name: float(row[name]) for name in row if name != "step"} for row in rows]
        if not traces:
            return
        traces = dict(sorted(traces.items(), key=lambda item: item[1][0]["η"]))
        losses = {name: [row["E_total"] for row in rows] for name, rows in traces.items()}
        _write_csv(folder / "losses.csv", losses, zip_longest(*losses.values()))
        # The workbook starts with the learning rate of docs/backprop.md if a run has it.
        example = min(traces.values(), key=lambda rows: abs(rows[0]["η"] - 0.5))
        write_workbook(folder / "backprop.xlsx", example, losses)
        print(f"{format_milestones(losses)}losses.csv and backprop.xlsx are in {folder}")


def _write_csv(file: Path, columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Write rows, each after its number, which counts from 1."""
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["step", *columns])
        writer.writerows([step, *row] for step, row in enumerate(rows, start=1))
