"""The files of a run folder that let it continue: whole checkpoints, and TensorBoard's curve up to one of them."""

import csv
import io
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from src.errors import UserError

FOLDER, NEWEST, BEFORE = "checkpoints", "last.ckpt", "previous.ckpt"
PARTS = {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "recovery"}


class WholeFiles(TorchCheckpointIO):
    """Writes beside and renames. Lightning writes to /tmp and moves, which copies where that is another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        content = io.BytesIO()
        torch.save(checkpoint, content)
        write_whole(Path(path), content.getbuffer())


def write_whole(file: Path, content: bytes | memoryview) -> None:
    """What stood at `file` stays until all of `content` is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error


def resume(run: Path, trainer: L.Trainer) -> Path | None:
    """The checkpoint to continue from; clears what was logged of the steps after it."""
    file = newest_sound(run)
    if trainer.is_global_zero:
        step = torch.load(file, map_location="cpu", weights_only=True)["global_step"] if file else 0
        drop_events(run, step)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                keep_rows(logger, step)
    return file


def keep_rows(logger: CSVLogger, step: int) -> None:
    """Lightning's logger begins a new metrics.csv: gives it the rows before `step` of the one that is there."""
    file, kept = Path(logger.log_dir, "metrics.csv"), []
    if file.is_file():
        with file.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("step", "").isdigit()]  # the last may be half
            kept = [{key: x for key, x in row.items() if key and x} for row in rows if int(row["step"]) < step]
    logger.experiment.metrics.extend(kept)
    logger.save()


def newest_sound(run: Path) -> Path | None:
    """The checkpoint to continue from, None if the run was stopped before its first.

    Names each damaged one on stderr. Raises UserError if all are.
    """
    files = [file for name in (NEWEST, BEFORE) if (file := run / FOLDER / name).exists()]
    for file in files:
        problem = _problem(file)
        if problem is None:
            return file
        print(f"warning: {file} cannot be used: {problem}", file=sys.stderr)
    if files:
        raise UserError(f"resume={run}: none of its checkpoints is sound; start the run again in another folder")
    return None


def _problem(file: Path) -> str | None:
    try:
        with zipfile.ZipFile(file) as archive:  # PyTorch does not compare the checksums when it reads
            if damaged := archive.testzip():
                return f"it is damaged in {damaged}"
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes raise whatever they like
        refused = "Weights only load failed" in str(error)
        return "it holds more than tensors and plain values" if refused else f"it is damaged ({type(error).__name__})"
    missing = PARTS - set(checkpoint) if isinstance(checkpoint, dict) else PARTS
    return f"it lacks {', '.join(sorted(missing))}" if missing else None


def drop_events(run: Path, step: int) -> None:
    """Takes everything from `step` on out of TensorBoard's files, lest the curve show what is trained again."""
    for file in run.glob("events.out.tfevents.*"):
        content = io.BytesIO()
        records = RecordWriter(content)
        for record in RawEventFileLoader(str(file)).Load():  # ends at a record that was cut short
            event = Event.FromString(record)
            if not event.HasField("summary") or event.step < step:
                records.write(record)
        write_whole(file, content.getbuffer())
