"""Instantiate the objects that a config describes."""

from copy import deepcopy
from inspect import signature
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import LightningModule
from omegaconf import DictConfig, OmegaConf

from src.core.error_messages import describe_error
from src.core.errors import UserError
from src.models.classifier import Classifier, check_outputs

RUN_CONFIG = "run_config"  # hyperparameter with the config of model, task and data


def instantiate_node(key: str, node: Any, **arguments: Any) -> Any:
    """Instantiate the config node `key` with further arguments; None for an empty one.

    Whatever a library raises becomes a UserError that names the key.
    """
    if not node:
        return None
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        return instantiate(plain, _convert_="all", **arguments)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if isinstance(cause, UserError):
            raise cause from error
        line = describe_error(cause) or " ".join((str(cause) or type(cause).__name__).split())
        raise UserError(line if line.startswith(key) else f"{key}: {line}") from error


def instantiate_all(key: str, node: Any) -> list[Any]:
    """Instantiate callbacks or loggers by name. Null entries are left out."""
    return [instantiate_node(f"{key}.{name}", child) for name, child in (node or {}).items() if child]


def instantiate_task(cfg: DictConfig) -> tuple[Any, Any]:
    """Instantiate the LightningModule and the LightningDataModule. Raise UserError if they do not fit."""
    data = instantiate_node("data", cfg.data)
    spec = None
    if hasattr(type(data), "spec"):  # asked of the object, the property would read data that is not yet prepared
        data.prepare_data()
        spec = data.spec
    task = build_task(cfg, spec)
    if isinstance(task, Classifier) and spec is not None:
        try:
            with torch.no_grad():
                outputs = deepcopy(task.net).eval()(torch.zeros(1, *spec.shape))
        except Exception as error:  # libraries raise different errors for a wrong shape
            problem = f"{type(task.net).__name__} takes no images of shape {spec.shape} ({error})"
            raise UserError(f"model: {problem}; set another model= or data=, or experiment= that sets both") from error
        check_outputs(outputs, len(spec.classes))
    return task, data


def build_task(cfg: DictConfig, spec: Any) -> Any:
    """Instantiate the LightningModule of the config, for images that `spec` describes, if any.

    It gets the network, the optimizer and the scheduler if its constructor takes them. Its own `net` replaces `model`.
    Lists in `task.loss`, such as weights of the classes, become tensors.
    """
    node, parts = cfg.task, dict[str, Any]()
    if _accepts(node, "net"):
        key = "task.net" if node.get("net") else "model"
        parts["net"] = instantiate_for_images(key, OmegaConf.select(cfg, key), spec)
    if _accepts(node, "optimizer") and not node.get("optimizer"):
        parts["optimizer"] = _instantiate_partial("optimizer", cfg.get("optimizer"), "groups")
    if _accepts(node, "scheduler") and not node.get("scheduler"):
        parts["scheduler"] = _instantiate_partial("scheduler", cfg.get("scheduler"), "interval", "monitor")
    if OmegaConf.is_dict(node.get("loss")):
        tensors = {name: torch.tensor(x, dtype=torch.float) for name, x in node.loss.items() if OmegaConf.is_list(x)}
        if spec and len(tensors.get("weight", spec.classes)) != len(spec.classes):
            raise UserError(f"task.loss.weight: needs one number for each of {len(spec.classes)} classes")
        parts["loss"] = instantiate_node("task.loss", node.loss, **tensors)
    if OmegaConf.is_dict(node.get("metrics")):
        used = {name: metric for name, metric in node.metrics.items() if metric}
        parts["metrics"] = {name: instantiate_for_images(f"task.metrics.{name}", x, spec) for name, x in used.items()}
    task = instantiate_node("task", node, **parts)
    if isinstance(task, LightningModule):  # Lightning writes hyperparameters into each checkpoint; src.load reads them
        config = OmegaConf.masked_copy(cfg, [key for key in ("model", "task", "data") if key in cfg])
        values = {RUN_CONFIG: OmegaConf.to_container(config, resolve=True)}
        if not hasattr(task, "lr"):
            values["lr"] = OmegaConf.select(cfg, "optimizer.lr")  # LearningRateFinder looks for it
        task.save_hyperparameters(values, logger=False)
    return task


def instantiate_for_images(key: str, node: Any, spec: Any) -> Any:
    """Instantiate a network or a metric with the image shape and the number of classes, if its constructor has them."""
    inferred: dict[str, Any] = {}
    if node and spec is not None:
        inferred = {"input_shape": spec.shape, "in_chans": spec.shape[0], "num_classes": len(spec.classes)}
    accepted = {name: value for name, value in inferred.items() if name not in node and _accepts(node, name)}
    return instantiate_node(key, node, **accepted)


def _accepts(node: Any, name: str) -> bool:
    """Return whether the constructor of a node takes an argument of this name."""
    target = get_object(node["_target_"])
    # The builders of torchvision and timm pass these on to a constructor.
    passed_on = {"torchvision": ("num_classes",), "timm": ("num_classes", "in_chans")}
    parameters, hidden = signature(target).parameters, passed_on.get(target.__module__.partition(".")[0], ())
    return name in parameters or (name in hidden and "kwargs" in parameters)


def _instantiate_partial(key: str, node: Any, *settings: str) -> Any:
    """Return the partial object of a node, None if it names none; its attributes are settings, not its arguments."""
    if not node or "_target_" not in node:
        return None
    plain: Any = OmegaConf.to_container(node, resolve=True)
    values = {name: plain.pop(name, None) for name in settings}
    factory = instantiate_node(key, plain, _partial_=True)
    vars(factory).update(values)
    return factory
