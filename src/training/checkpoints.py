"""Read and write checkpoints, and start from the weights of another run.

Besides Lightning's state a checkpoint has:
- `resume`, of ResumeCheckpoint: the sums of metrics and whatever else a run needs to continue within an epoch
- the ImageSpec of the data module: `src.load` prepares images by it, and a resumed run refuses others
- the config of model, task and data, among the hyperparameters: `src.load` builds the network from it
- seconds, of RunRecorder, for metrics.json
- `rows`, of the backprop task, for trace.csv
"""

import io
import json
import re
import zipfile
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from src.core.errors import UserError
from src.core.files import write_atomically
from src.core.process import is_first_process
from src.optim.configure import compile_layer_pattern
from src.training.console import is_verbose

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary file beside the checkpoint and rename it; the last.ckpt before becomes previous.ckpt."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        file, buffer = Path(path), io.BytesIO()
        for key in "hyper_parameters", "datamodule_hyper_parameters":  # objects could not be loaded again
            if values := checkpoint.get(key):
                checkpoint[key] = {name: value for name, value in values.items() if _is_plain(value)}
        torch.save(checkpoint, buffer)
        if file.name == LAST and file.exists():
            file.with_name(PREVIOUS).write_bytes(file.read_bytes())
        file.with_suffix(".ood.pt").unlink(missing_ok=True)  # the OOD detector was fitted to the old weights
        write_atomically(file, buffer.getbuffer())


def _is_plain(value: Any) -> bool:
    try:
        return bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


def load_weights_only(file: Path) -> Any:
    """Load tensors and plain values that torch.save wrote. Raise UserError with the reason if that fails."""
    try:
        with zipfile.ZipFile(file) as archive:
            if part := archive.testzip():  # torch.load compares no checksums
                raise zipfile.BadZipFile(part)
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file") from error
    except Exception as error:  # damaged bytes raise exceptions of any type
        reason = f"damaged, or more than tensors and plain values ({type(error).__name__})"
        raise UserError(f"{file}: {reason}") from error


def find_checkpoint(path: Path | str, best: bool = False) -> Path:
    """Return the last or best checkpoint of a run folder, or the file itself."""
    return Path(path, "checkpoints", "best.ckpt" if best else LAST) if Path(path).is_dir() else Path(path)


def load_initial_weights(module: LightningModule, path: str, skip: str | list[str], folder: Path) -> None:
    """Load what has the name and the shape of a tensor of `module`; record it in init_from.json in the run folder.

    A file of a network alone is loaded into `module.net`. Raises UserError.
    """
    file, own = find_checkpoint(path), module.state_dict()
    patterns = [skip] if isinstance(skip, str) else skip
    try:
        content = load_weights_only(file)
        given = content.get("state_dict", content)
        is_skipped = compile_layer_pattern("|".join(patterns) or "$.").fullmatch
    except (UserError, AttributeError, re.error) as error:
        raise UserError(f"init_from={path}: {error}; name a run folder, a .ckpt or a .pt file") from error
    if not own.keys() & given.keys():
        given = {f"net.{name}": value for name, value in given.items()}
    skipped = [name for name in own if is_skipped(name)]
    missing = [name for name in own if name not in {*given, *skipped}]
    other_shape = [name for name in own if name not in {*missing, *skipped} and given[name].shape != own[name].shape]
    left_out = {"skipped": skipped, "not in the file": missing, "other shape": other_shape}
    loaded = {name: given[name] for name in own if not any(name in names for names in left_out.values())}
    record = {"file": str(file), "loaded": f"{len(loaded)} of {len(own)} tensors", **left_out}
    reasons = [f"{reason}: {', '.join(names)}" for reason, names in left_out.items() if names]
    line = shorten("; ".join([f"init_from={path}: {record['loaded']}", *reasons]), 400)
    if patterns and not skipped:
        raise UserError(f"init_from.skip={patterns}: no such layer; the network has {shorten(', '.join(own), 400)}")
    if not any(value.ndim for value in loaded.values()):
        raise UserError(f"{line}; the file has {shorten(', '.join(given), 400)}")
    module.load_state_dict(loaded, strict=False)
    if is_first_process():
        write_atomically(folder / "init_from.json", json.dumps(record, indent=1).encode())
        if is_verbose():
            print(line)


def find_monitored_checkpoint(trainer: Trainer) -> Any:
    """Return the first callback that keeps the weights with the best value of a metric."""
    return next((callback for callback in trainer.checkpoint_callbacks if getattr(callback, "monitor", None)), None)


def is_finite(state: dict[str, Any]) -> bool:
    """Return whether all tensors of a state_dict are finite."""
    return all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, torch.Tensor))
