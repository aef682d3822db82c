"""Trained networks from files. Nothing in a file is ever run: weights alone are read, and only into src.models."""

import pickle
import re
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from yaml import YAMLError

from src.errors import UserError

SHIPPED = Path(__file__).parents[1] / "weights/mnist.pt"
KINDS = "a run folder, a .ckpt of one, or a .pt file"


class Trained(NamedTuple):
    net: nn.Module  # in evaluation mode, on the CPU
    file: Path
    dataset: str  # what it was trained on: mnist, digits or auto


def load(path: Path | None = None) -> Trained:
    """The network of a run folder (its last epoch), of a checkpoint in one, or of a .pt file."""
    path = path or SHIPPED
    file = path / "checkpoints/last.ckpt" if path.is_dir() else path
    if not file.is_file():
        if path.is_dir() and list(path.glob("*/checkpoints")):
            raise UserError(f"{path} is a sweep; name one of the run folders in it")
        raise UserError(f"{file}: no such file; name {KINDS}")
    content = _read(file)
    if "model" in content:
        model, dataset = content["model"], content.get("dataset", "mnist")
        state = content["state_dict"]
    else:
        model, dataset = _config(file)
        state = {
            name.removeprefix("net."): tensor
            for name, tensor in content["state_dict"].items()
            if name.startswith("net.")
        }
    try:
        net = _build(model)
        net.load_state_dict(state)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: its weights do not fit the model it names ({reason})") from error
    return Trained(net.eval().requires_grad_(False), file, dataset)


def _read(file: Path) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{file}: not a file of weights, or a damaged one") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{file}: holds no state_dict; name {KINDS}")
    return content


def _config(checkpoint: Path) -> tuple[Any, str]:
    """The model and the data set that a run was configured with."""
    file = checkpoint.parents[1] / ".hydra/config.yaml"
    try:
        config = OmegaConf.load(file)
        model, dataset = OmegaConf.to_container(config.model, resolve=True), config.data.get("dataset")
    except (OSError, YAMLError, OmegaConfBaseException, AttributeError) as error:
        raise UserError(f"{file}: not the config of a run; {checkpoint.name} is read beside one") from error
    if dataset is None:
        raise UserError(f"{checkpoint}: of a run that did not train on images of digits")
    return model, dataset


def _build(model: Any) -> nn.Module:
    target = str(model.get("_target_")) if isinstance(model, dict) else ""
    if not re.fullmatch(r"src\.models\.\w+\.\w+", target):
        raise UserError(f"model {target or model}: only those in src/models are built")
    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError:
        found = None
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise UserError(f"{target}: no network of that name")
    return found(**{key: value for key, value in model.items() if key != "_target_"})
