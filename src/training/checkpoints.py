"""Read and write checkpoints, and start from the weights of another run.

Besides Lightning's state a checkpoint has:
- `resume`, of ResumeCheckpoint: the sums of metrics and whatever else a run needs to continue within an epoch
- the ImageSpec of the data module: `src.load` prepares images by it, and a resumed run refuses others
- the config of model, task and data, among the hyperparameters: `src.load` builds the network from it
- seconds, samples and initial weights, of RunRecorder, for metrics.json
- `rows`, of the backprop task, for trace.csv
"""

import io
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from src.core.errors import UserError
from src.core.files import write_atomically
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
    except Exception as error:  # damaged bytes raise exceptions of any type
        raise UserError(f"damaged, or more than tensors and plain values ({type(error).__name__})") from error


def load_initial_weights(module: LightningModule, path: str, skip: str | list[str]) -> dict[str, Any]:
    """Load what has the name and the shape of a tensor of `module`; return what metrics.json says about it.

    Names in the file may lack the attribute of the module that holds its network. Raises UserError.
    """
    file = Path(path, "checkpoints", LAST) if Path(path).is_dir() else Path(path)
    patterns = [skip] if isinstance(skip, str) else skip
    try:
        if not file.is_file():
            raise UserError("no such file; name a run folder, a .ckpt or a .pt file")
        content = load_weights_only(file)
        content = content.get("state_dict", content)
        is_skipped = compile_layer_pattern("|".join(patterns) or "$.").fullmatch
    except (UserError, AttributeError, re.error) as error:
        raise UserError(f"init_from={path}: {file}: {error}") from error
    own = module.state_dict()
    prefixes = ["", *(f"{name}." for name, _ in module.named_children())]
    prefix = max(prefixes, key=lambda prefix: sum(f"{prefix}{name}" in own for name in content))
    given = {f"{prefix}{name}": value for name, value in content.items() if isinstance(value, torch.Tensor)}
    skipped = [name for name in own if is_skipped(name)]
    shapes = {n: (list(given[n].shape), list(own[n].shape)) for n in own if n in given and n not in skipped}
    loaded = {name: given[name] for name, (shape, own_shape) in shapes.items() if shape == own_shape}
    reasons = {
        "skipped": skipped,
        "not in the file": [name for name in own if name not in given and name not in skipped],
        "not in the network": [name for name in given if name not in own],
        "other shape": [f"{name} {shapes[name][0]}, not {shapes[name][1]}" for name in shapes if name not in loaded],
    }
    reasons = {reason: names for reason, names in reasons.items() if names}
    line = f"init_from={path}: {len(loaded)} of {len(own)} tensors from {file}"
    for reason, names in reasons.items():
        line += f"; {reason}: {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    if patterns and not skipped:
        layers = dict.fromkeys(".".join(name.split(".")[:2]) for name in own)
        raise UserError(f"init_from.skip={patterns}: no such layer or tensor; there are {', '.join(layers)}")
    if not any(value.ndim for value in loaded.values()):
        raise UserError(line)
    module.load_state_dict(loaded, strict=False)
    if is_verbose():
        print(line)
    return {"file": str(file), "loaded": f"{len(loaded)} of {len(own)} tensors", **reasons}


def find_monitored_checkpoint(trainer: Trainer) -> ModelCheckpoint | None:
    """Return the first callback that keeps the weights with the best value of a metric."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    return next((callback for callback in callbacks if callback.monitor), None)


def is_finite(state: dict[str, Any]) -> bool:
    """Return whether all tensors of a state_dict are finite."""
    return all(bool(value.isfinite().all()) for value in state.values() if isinstance(value, torch.Tensor))
