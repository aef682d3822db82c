"""Instantiate the objects that a config describes."""

import re
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf

from src.core.config import find_closest
from src.core.error_messages import describe_error
from src.core.errors import UserError
from src.optim.configure import Scheduler


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
        if unexpected := re.search(r"unexpected keyword argument '(\w+)'", str(cause)):
            name, target = unexpected[1], node["_target_"]
            match = find_closest(name, list(signature(get_object(target)).parameters))
            hint = f"; did you mean {key}.{match}?" if match else ""
            raise UserError(f"{key}.{name}: {target} has no such argument{hint}") from error
        line = describe_error(cause) or " ".join((str(cause) or type(cause).__name__).split())
        raise UserError(line if line.startswith(key) else f"{key}: {line}") from error


def instantiate_all(key: str, node: Any) -> list[Any]:
    """Instantiate callbacks or loggers: a single one, several by name, or a list. Null entries are left out."""
    if not node:
        return []
    nodes = {"": node} if "_target_" in node else dict(node if hasattr(node, "keys") else enumerate(node))
    base, objects = {"callbacks": Callback, "logger": Logger}[key], []
    for name, child in nodes.items():
        if child:
            child_key = f"{key}.{name}".removesuffix(".")
            objects.append(instantiate_node(child_key, child))
            if not isinstance(objects[-1], base):
                raise UserError(f"{child_key}: {type(objects[-1]).__name__} is not a Lightning {base.__name__}")
    return objects


def instantiate_task(cfg: DictConfig, data: Any = None) -> tuple[Any, Any]:
    """Instantiate the LightningModule and, unless given, the LightningDataModule.

    The module gets the network, the optimizer and the scheduler if its constructor takes them, the network the shape
    and the number of classes of the images.
    """
    data = data or instantiate_node("data", cfg.data)
    spec = None
    if hasattr(type(data), "spec"):  # asked of the object, the property would read data that is not yet prepared
        data.prepare_data()
        spec = data.spec
    net = instantiate_node("model", cfg.model, **infer_network_arguments(cfg.model, spec))
    if net is not None and spec is not None:
        _check_image_shape(net, spec.shape)
    optimizer, scheduler = instantiate_node("optimizer", cfg.optimizer), _instantiate_scheduler(cfg.scheduler)
    parts = {"net": net, "optimizer": optimizer, "scheduler": scheduler}
    accepts = _list_accepted_arguments(cfg.task)
    return instantiate_node("task", cfg.task, **{name: part for name, part in parts.items() if accepts(name)}), data


def infer_network_arguments(node: Any, spec: Any) -> dict[str, Any]:
    """Return the image shape and the number of classes under the names that a network's constructor has for them."""
    if not node or spec is None:
        return {}
    accepts = _list_accepted_arguments(node)
    values = {"inputs": spec.shape, "classes": len(spec.classes), "num_classes": len(spec.classes)}
    return {name: value for name, value in values.items() if accepts(name) and name not in node}


def _list_accepted_arguments(node: Any) -> Callable[[str], bool]:
    target = get_object(node["_target_"])
    parameters = signature(target).parameters
    has_kwargs = any(parameter.kind == Parameter.VAR_KEYWORD for parameter in parameters.values())
    # torchvision's builders pass num_classes on to a constructor.
    is_torchvision = has_kwargs and target.__module__.startswith("torchvision.models")
    return lambda name: name in parameters or (name == "num_classes" and is_torchvision)


def _check_image_shape(net: Any, shape: tuple[int, ...]) -> None:
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape))
    except Exception as error:  # libraries raise different errors for a wrong shape
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: {type(net).__name__} takes no images of shape {shape} ({reason}); set another model= or data=, or "
            "an experiment= that sets both"
        ) from error
    net.train()


def _instantiate_scheduler(node: Any) -> Scheduler | None:
    if not node or "_target_" not in node:
        return None
    settings = {key: node.get(key) for key in ("interval", "monitor")}
    factory = instantiate_node("scheduler", {key: value for key, value in node.items() if key not in settings})
    return Scheduler(factory, **settings)
