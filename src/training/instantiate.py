"""From a config to what it describes."""

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


def instantiate_node(key: str, node: Any, **further: Any) -> Any:
    """The object of a config's `key`; None for nothing. What a library complains of is the user's line."""
    if not node:
        return None
    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    try:
        return instantiate(plain, _convert_="all", **further)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        if isinstance(cause, UserError):
            raise cause from error
        if unexpected := re.search(r"unexpected keyword argument '(\w+)'", str(cause)):
            name, target = unexpected[1], node["_target_"]
            guess = find_closest(name, list(signature(get_object(target)).parameters))
            meant = f"; did you mean {key}.{guess}?" if guess else ""
            raise UserError(f"{key}.{name}: {target} has no such argument{meant}") from error
        line = describe_error(cause) or " ".join((str(cause) or type(cause).__name__).split())
        raise UserError(line if line.startswith(key) else f"{key}: {line}") from error


def accepts_argument(node: Any) -> Callable[[str], bool]:
    """Whether what a config builds has an argument of that name. torchvision's builders pass further ones on."""
    target = get_object(node["_target_"])
    arguments = signature(target).parameters
    passes_on = any(one.kind == Parameter.VAR_KEYWORD for one in arguments.values())
    known = {"num_classes"} if passes_on and target.__module__.startswith("torchvision.models") else set()
    return lambda name: name in arguments or name in known


def infer_network_arguments(node: Any, spec: Any) -> dict[str, Any]:
    """What a network may want to know of its images, unless its config says so: their shape, how many classes."""
    if not node or spec is None:
        return {}
    has = accepts_argument(node)
    known = {"inputs": spec.shape, "classes": len(spec.classes), "num_classes": len(spec.classes)}
    return {name: fact for name, fact in known.items() if has(name) and name not in node}


def instantiate_task(cfg: DictConfig, data: Any = None) -> tuple[Any, Any]:
    """The LightningModule and the LightningDataModule, unless that is at hand.

    The module gets the network, the optimizer and the scheduler where its constructor takes them; the network the shape
    and the classes of the images.
    """
    data = data or instantiate_node("data", cfg.data)
    spec = None
    if hasattr(type(data), "spec"):  # asked of the object, it would be read before it is prepared
        data.prepare_data()
        spec = data.spec
    net = instantiate_node("model", cfg.model, **infer_network_arguments(cfg.model, spec))
    if net is not None and spec is not None:
        _try(net, spec.shape)
    parts = {
        "net": net,
        "optimizer": instantiate_node("optimizer", cfg.optimizer),
        "scheduler": _scheduler(cfg.scheduler),
    }
    has = accepts_argument(cfg.task)
    return instantiate_node("task", cfg.task, **{name: part for name, part in parts.items() if has(name)}), data


def _try(net: Any, shape: tuple[int, ...]) -> None:
    """Raises UserError for a network that cannot take such an image."""
    try:
        with torch.no_grad():
            net.eval()(torch.zeros(1, *shape))
    except Exception as error:  # whatever a library says to a wrong shape
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"model: {type(net).__name__} takes no images of shape {shape} ({reason}); set another model= or data=, or "
            "an experiment= that has both"
        ) from error
    net.train()


def _scheduler(node: Any) -> Scheduler | None:
    if not node or "_target_" not in node:
        return None
    how = {key: node.get(key) for key in ("interval", "monitor")}
    return Scheduler(
        instantiate_node("scheduler", {key: value for key, value in node.items() if key not in how}), **how
    )


def instantiate_all(key: str, node: Any) -> list[Any]:
    """Loggers or callbacks: one, several by name, or in a list."""
    if not node:
        return []
    named = (
        {"": node}
        if "_target_" in node
        else dict(node)
        if isinstance(node, dict | DictConfig)
        else dict(enumerate(node))
    )
    kind, built = {"callbacks": Callback, "logger": Logger}[key], []
    for name, one in named.items():
        if not one:
            continue
        place = f"{key}.{name}".removesuffix(".")
        built.append(instantiate_node(place, one))
        if not isinstance(built[-1], kind):
            raise UserError(f"{place}: {type(built[-1]).__name__} is no {kind.__name__} of Lightning's")
    return built
