"""Read and write checkpoints, and find the one that a run resumes from."""

import csv
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from src.core.errors import UserError
from src.core.files import write_atomically

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside the old one and rename it; Lightning writes to /tmp, which may be on another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getbuffer())


def load_weights_only(file: Path) -> Any:
    """Load tensors and plain values that torch.save wrote. Raise UserError with the reason if that fails."""
    try:
        with zipfile.ZipFile(file) as archive:
            if part := archive.testzip():  # torch.load compares no checksums
                raise zipfile.BadZipFile(part)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise exceptions of any type
        is_refused = "Weights only load failed" in str(error)
        reason = "holds more than tensors and plain values" if is_refused else f"damaged ({type(error).__name__})"
        raise UserError(reason) from error


def is_finite(state: dict[str, Any]) -> bool:
    """Return whether all tensors of a state_dict are finite."""
    return all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, torch.Tensor))


def find_resume_checkpoint(run_folder: Path, trainer: L.Trainer) -> Path | None:
    """Return the newest undamaged checkpoint, or None if the run was stopped before its first one.

    Prints a warning for each damaged one and raises UserError if all are. Removes what will be logged again.
    """
    files = [file for name in (LAST, PREVIOUS) if (file := run_folder / "checkpoints" / name).exists()]
    checkpoint, step = None, 0
    for file in files:
        try:
            checkpoint, step = file, load_weights_only(file)["global_step"]
            break
        except UserError as error:
            print(f"warning: {file}: {error}", file=sys.stderr)
    if files and not checkpoint:
        raise UserError(f"resume={run_folder}: all checkpoints are damaged; start the run again in another folder")
    for logger in trainer.loggers if trainer.is_global_zero else ():
        if isinstance(logger, TensorBoardLogger):
            for _ in range(2):  # TensorBoard drops events from this step on; one of its readers ignores the first start
                start = Event(step=step, session_log=SessionLog(status=SessionLog.START))
                logger.experiment.file_writer.add_event(start)
        elif isinstance(logger, CSVLogger) and (file := Path(logger.log_dir, "metrics.csv")).is_file():
            with file.open(newline="") as stream:
                rows = [row for row in csv.DictReader(stream, restval="") if row["step"].isdigit()]
            kept = [{key: value for key, value in row.items() if value} for row in rows if int(row["step"]) < step]
            logger.experiment.metrics.extend(kept)  # Lightning's logger begins a new file
            logger.save()
    return checkpoint
