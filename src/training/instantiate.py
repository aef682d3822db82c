"""Instantiate the objects that a config describes."""

from collections.abc import Callable
from copy import deepcopy
from inspect import Parameter, signature
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
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
    base = {"callbacks": Callback, "logger": Logger}[key]
    objects = {f"{key}.{name}": instantiate_node(f"{key}.{name}", child) for name, child in (node or {}).items()}
    objects = {name: instance for name, instance in objects.items() if instance is not None}
    for name, instance in objects.items():
        if not isinstance(instance, base):
            raise UserError(f"{name}: {type(instance).__name__} is not a Lightning {base.__name__}")
    return [*objects.values()]


def instantiate_task(cfg: DictConfig, data: Any = None) -> tuple[Any, Any]:
    """Instantiate the LightningModule and, unless given, the LightningDataModule."""
    data = data or instantiate_node("data", cfg.data)
    spec = None
    if hasattr(type(data), "spec"):  # asked of the object, the property would read data that is not yet prepared
        data.prepare_data()
        spec = data.spec
    task = build_task(cfg, spec)
    if isinstance(task, Classifier) and spec is not None:
        _check_network(task.net, spec)
    return task, data


def build_task(cfg: DictConfig, spec: Any) -> Any:
    """Instantiate the LightningModule of the config, for images that `spec` describes, if any.

    It gets the network, the optimizer and the scheduler if its constructor takes them. Its own `net` replaces `model`.
    Lists in `task.loss`, such as weights of the classes, become tensors.
    """
    node, accepts = cfg.task, _make_accepts(cfg.task)
    parts: dict[str, Any] = {}
    if accepts("net"):
        key = "task.net" if node.get("net") else "model"
        parts["net"] = instantiate_for_images(key, OmegaConf.select(cfg, key), spec)
    if accepts("optimizer") and not node.get("optimizer"):
        parts["optimizer"] = instantiate_partial("optimizer", cfg.get("optimizer"), "groups")
    if accepts("scheduler") and not node.get("scheduler"):
        parts["scheduler"] = instantiate_partial("scheduler", cfg.get("scheduler"), "interval", "monitor")
    if OmegaConf.is_dict(node.get("loss")):
        tensors = {name: torch.tensor(x, dtype=torch.float) for name, x in node.loss.items() if OmegaConf.is_list(x)}
        count = len(spec.classes) if spec else None
        if count and len(tensors.get("weight", spec.classes)) != count:
            raise UserError(f"task.loss.weight={node.loss.weight}: needs one number for each of {count} classes")
        parts["loss"] = instantiate_node("task.loss", node.loss, **tensors)
    if OmegaConf.is_dict(node.get("metrics")):
        used = {f"task.metrics.{name}": metric for name, metric in node.metrics.items() if metric}
        parts["metrics"] = {key.rpartition(".")[2]: instantiate_for_images(key, x, spec) for key, x in used.items()}
    task = instantiate_node("task", node, **parts)
    if isinstance(task, LightningModule):  # Lightning writes hyperparameters into each checkpoint; src.load reads them
        config = OmegaConf.masked_copy(cfg, [key for key in ("model", "task", "data") if key in cfg])
        values = {RUN_CONFIG: OmegaConf.to_container(config, resolve=True)}
        if "lr" not in task.hparams and not hasattr(task, "lr"):
            values["lr"] = OmegaConf.select(cfg, "optimizer.lr")  # LearningRateFinder looks for it
        task.save_hyperparameters(values, logger=False)
    return task


def instantiate_for_images(key: str, node: Any, spec: Any) -> Any:
    """Instantiate a network or a metric with the image shape and the number of classes, if its constructor has them."""
    inferred: dict[str, Any] = {}
    if node and spec is not None:
        accepts = _make_accepts(node)
        values = {"input_shape": spec.shape, "in_chans": spec.shape[0], "num_classes": len(spec.classes)}
        inferred = {name: value for name, value in values.items() if accepts(name) and name not in node}
    return instantiate_node(key, node, **inferred)


def _make_accepts(node: Any) -> Callable[[str], bool]:
    """Return a function that tells whether the constructor of a node takes an argument of a name."""
    target = get_object(node["_target_"])
    parameters = signature(target).parameters
    has_kwargs = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values())
    # The builders of torchvision and timm pass these on to a constructor.
    passed_on = {"torchvision": ("num_classes",), "timm": ("num_classes", "in_chans")}
    hidden = passed_on.get(target.__module__.partition(".")[0], ()) if has_kwargs else ()
    return lambda name: name in parameters or name in hidden


def _check_network(net: Any, spec: Any) -> None:
    try:
        with torch.no_grad():
            outputs = deepcopy(net).eval()(torch.zeros(1, *spec.shape))
    except Exception as error:  # libraries raise different errors for a wrong shape
        reason = (str(error) or type(error).__name__).splitlines()[0]
        fix = "set another model= or data=, or an experiment= that sets both"
        problem = f"{type(net).__name__} takes no images of shape {spec.shape} ({reason})"
        raise UserError(f"model: {problem}; {fix}") from error
    check_outputs(outputs, len(spec.classes))


def instantiate_partial(key: str, node: Any, *settings: str) -> Any:
    """Return the partial object of a node, None if it names none; its attributes are settings, not its arguments."""
    if not node or "_target_" not in node:
        return None
    plain: Any = OmegaConf.to_container(node, resolve=True)
    values = {name: plain.pop(name, None) for name in settings}
    factory = instantiate_node(key, plain, _partial_=True)
    vars(factory).update(values)
    return factory
