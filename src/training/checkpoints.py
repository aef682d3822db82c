"""Read and write checkpoints, and find the one that a run resumes from."""

import csv
import io
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from src.core.errors import UserError
from src.core.files import write_atomically
from src.optim.configure import compile_layer_pattern
from src.training.console import is_verbose

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Replace a checkpoint when the new one is on the disk (Lightning moves it from /tmp); keep previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file, buffer = Path(path), io.BytesIO()
        torch.save(checkpoint, buffer)
        if file.name == LAST and file.exists():
            file.with_name(PREVIOUS).write_bytes(file.read_bytes())
        file.with_suffix(".ood.pt").unlink(missing_ok=True)  # the detector was fitted to the weights before
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


def load_initial_weights(module: LightningModule, path: str, skip: str | list[str]) -> dict[str, Any]:
    """Load what has the name and the shape of a tensor of `module`; return what metrics.json says about it.

    Names in the file may lack the attribute of the module that holds its network. Raises UserError.
    """
    skip = [skip] if isinstance(skip, str) else skip
    file = Path(path, "checkpoints", LAST) if Path(path).is_dir() else Path(path)
    try:
        if not file.is_file():
            raise UserError("no such file; name a run folder, a .ckpt or a .pt file")
        content = load_weights_only(file)
        content = content.get("state_dict", content)
        patterns = [compile_layer_pattern(text) for text in skip]
    except (UserError, AttributeError, re.error) as error:
        raise UserError(f"init_from={path}: {file}: {error}") from error
    own = module.state_dict()
    prefixes = ["", *(f"{name}." for name, _ in module.named_children())]
    prefix = max(prefixes, key=lambda prefix: sum(f"{prefix}{name}" in own for name in content))
    given = {f"{prefix}{name}": value for name, value in content.items() if isinstance(value, torch.Tensor)}
    loaded: dict[str, torch.Tensor] = {}
    reasons: dict[str, list[str]] = {}
    for name in own | given:
        shapes = [list(tensors[name].shape) for tensors in (given, own) if name in tensors]
        if name not in own:
            reasons.setdefault("not in the network", []).append(name)
        elif any(pattern.fullmatch(name) for pattern in patterns):
            reasons.setdefault("skipped", []).append(name)
        elif name not in given:
            reasons.setdefault("not in the file", []).append(name)
        elif shapes[0] != shapes[1]:
            reasons.setdefault("other shape", []).append(f"{name} {shapes[0]}, not {shapes[1]}")
        else:
            loaded[name] = given[name]
    record = {"file": str(file), "loaded": f"{len(loaded)} of {len(own)} tensors", **reasons}
    line = f"init_from={path}: {record['loaded']} from {record['file']}"
    for reason, names in reasons.items():
        line += f"; {reason}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if unmatched := [
        text for text, pattern in zip(skip, patterns, strict=True) if not any(map(pattern.fullmatch, own))
    ]:
        layers = dict.fromkeys(".".join(name.split(".")[:2]) for name in own)
        raise UserError(f"init_from.skip={unmatched}: no such layer or tensor; there are {', '.join(layers)}")
    if not any(value.ndim for value in loaded.values()):
        raise UserError(line)
    module.load_state_dict(loaded, strict=False)
    if is_verbose():
        print(line)
    return record


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
