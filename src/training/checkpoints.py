"""The files of a run folder that let it continue: whole checkpoints, and TensorBoard's curve up to one of them."""

import csv
import hashlib
import io
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from google.protobuf.message import DecodeError
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from src.core.errors import UserError
from src.core.files import write_atomically

FOLDER, LAST, BEFORE = "checkpoints", "last.ckpt", "previous.ckpt"
SEAL_BYTES = 32
PARTS = {"state_dict", "loops", "callbacks", "optimizer_states", "lr_schedulers", "recovery"}


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside and renames. Lightning writes to /tmp and moves, which copies where that is another disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        write_atomically(Path(path), sealed(checkpoint, str(checkpoint.get("run"))))


def sealed(value: Any, of: str) -> bytes:
    """What torch.save writes, and as that zip archive's comment a digest of it and of what it belongs to."""
    stream = io.BytesIO()
    torch.save(value, stream)
    content = stream.getvalue()
    return content[:-2] + SEAL_BYTES.to_bytes(2, "little") + _seal(content, of)


def _seal(content: bytes, of: str) -> bytes:
    return hashlib.sha256(content + of.encode()).digest()


def _check_seal(file: Path, of: str) -> None:
    data = file.read_bytes()
    if data[-SEAL_BYTES:] != _seal(data[: -SEAL_BYTES - 2] + bytes(2), of):
        raise UserError("it was changed after it was written, or is of another run")


def find_resume_checkpoint(run: Path, trainer: L.Trainer, digest=None) -> Path | None:
    """The checkpoint to continue from; clears what was logged of the steps after it. `digest` is that of the config."""
    file = find_valid_checkpoint(run, digest)
    best = run / FOLDER / "best.ckpt"
    if best.exists() and (problem := _problem(best, digest)):  # it would be asked for its epoch when all is done
        raise UserError(f"{best} cannot be used: {problem}; delete it, and the run goes on without")
    if file:
        trainer.num_sanity_val_steps = 0  # it would clear the scores that the checkpoint has
    if trainer.is_global_zero:
        step = torch.load(file, map_location="cpu", weights_only=True)["global_step"] if file else 0
        drop_events_after(run, step)
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                keep_csv_rows_before(logger, step)
    return file


def keep_csv_rows_before(logger: CSVLogger, step: int) -> None:
    """Lightning's logger begins a new metrics.csv: gives it the rows before `step` of the one that is there."""
    file, kept = Path(logger.log_dir, "metrics.csv"), []
    if file.is_file():
        with file.open(newline="") as stream:
            rows = [row for row in csv.DictReader(stream) if row.get("step", "").isdigit()]  # the last may be half
            kept = [{key: x for key, x in row.items() if key and x} for row in rows if int(row["step"]) < step]
    logger.experiment.metrics.extend(kept)
    logger.save()


def find_valid_checkpoint(run: Path, digest: str | None = None) -> Path | None:
    """The checkpoint to continue from, of a config of that `digest`; None if the run was stopped before its first.

    Names each damaged one on stderr. Raises UserError if all are.
    """
    files = [file for name in (LAST, BEFORE) if (file := run / FOLDER / name).exists()]
    for file in files:
        problem = _problem(file, digest)
        if problem is None:
            return file
        print(f"warning: {file} cannot be used: {problem}", file=sys.stderr)
    if files:
        raise UserError(f"resume={run}: none of its checkpoints is sound; start the run again in another folder")
    return None


def _problem(file: Path, digest: str | None) -> str | None:
    try:
        checkpoint = load_weights_only(file)
        missing = PARTS - set(checkpoint) if isinstance(checkpoint, dict) else PARTS
        if missing:
            return f"it lacks {', '.join(sorted(missing))}"
        if digest is not None and checkpoint.get("run") != digest:
            return "it is of a run with another config"
        _check_seal(file, str(checkpoint.get("run")))
    except UserError as error:
        return str(error)
    return None if is_finite(checkpoint["state_dict"]) else "its weights are not finite"


def load_weights_only(file: Path, of: str | None = None) -> Any:
    """What torch.save wrote, tensors and plain values alone. Raises UserError for anything else.

    Neither a wrong checksum, which PyTorch does not look at, nor what would unpack to more than its size is accepted.
    `of` is what `sealed` was given, if that wrote it.
    """
    try:
        if not file.is_file():
            raise UserError("it is not a file")
        if of is not None:
            _check_seal(file, of)
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                raise UserError("it is packed, as PyTorch packs nothing")
            if damaged := archive.testzip():
                raise UserError(f"it is damaged in {damaged}")
        content = torch.load(file, map_location="cpu", weights_only=True)
        if _unfolded(content, set()) > 4 * file.stat().st_size:  # several may share their numbers, but not that many
            raise UserError("its tensors are larger than the file")
        return content
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise whatever they like
        refused = "Weights only load failed" in str(error)
        reason = "it holds more than tensors and plain values" if refused else f"it is damaged ({type(error).__name__})"
        raise UserError(reason) from error


def _unfolded(value: Any, seen: set[int]) -> int:
    """Bytes of all tensors, once for each place that holds one; `seen` has the containers looked at before."""
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_meta:
            raise UserError("it holds tensors that are not plain numbers")
        return value.numel() * value.element_size()
    if not isinstance(value, dict | list | tuple) or id(value) in seen:
        return 0
    seen.add(id(value))
    return sum(_unfolded(each, seen) for each in (value.values() if isinstance(value, dict) else value))


def is_finite(state: Any) -> bool:
    tensors = state.values() if isinstance(state, dict) else ()
    return all(bool(x.isfinite().all()) for x in tensors if isinstance(x, torch.Tensor) and x.is_floating_point())


def drop_events_after(run: Path, step: int) -> None:
    """Takes everything from `step` on out of TensorBoard's files, lest the curve show what is trained again."""
    for file in run.glob("events.out.tfevents.*"):
        content = io.BytesIO()
        records = RecordWriter(content)
        with suppress(MemoryError, DecodeError):  # a record that says it is larger than the file, or that is none
            for record in RawEventFileLoader(str(file)).Load():  # ends at a record that was cut short
                event = Event.FromString(record)
                if not event.HasField("summary") or event.step < step:
                    records.write(record)
        write_atomically(file, content.getbuffer())
