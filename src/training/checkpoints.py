"""Read and write checkpoints, and find the one that a run resumes from."""

import csv
import io
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from src.core.errors import UserError
from src.core.files import write_atomically

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replace a checkpoint when the new one is on the disk (Lightning moves it from /tmp); keep previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file, buffer = Path(path), io.BytesIO()
        torch.save(checkpoint, buffer)
        if file.name == LAST and file.exists():
            file.with_name(PREVIOUS).write_bytes(file.read_bytes())
        write_atomically(file, buffer.getbuffer())


def load_weights_only(file: Path) -> Any:
    """Load tensors and plain values that torch.save wrote. Raise UserError with the reason if that fails."""
    try:
        with zipfile.ZipFile(file) as archive:
            if part := archive.testzip():  # torch.load compares no checksums
                raise zipfile.BadZipFile(part)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise exceptions of any type
        raise UserError(f"damaged, or more than tensors and plain values ({type(error).__name__})") from error


def is_finite(state: dict[str, Any]) -> bool:
    """Return whether all tensors of a state_dict are finite."""
    return all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, torch.Tensor))


def find_resume_checkpoint(run_folder: Path, trainer: Trainer) -> Path | None:
    """Return the newest undamaged checkpoint or None, warn of damaged ones, and remove what will be logged again."""
    checkpoint, step = None, 0
    files = [file for name in (LAST, PREVIOUS) if (file := run_folder / "checkpoints" / name).exists()]
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
            for writer in [logger.experiment.file_writer] * 2:  # a reader of TensorBoard ignores the first start
                writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        elif isinstance(logger, CSVLogger) and (file := Path(logger.log_dir, "metrics.csv")).is_file():
            rows = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file.read_text().splitlines())]
            logger.experiment.metrics.extend(row for row in rows if int(row.get("step", step)) < step)
            logger.save()  # to the new file that Lightning begins
    return checkpoint
