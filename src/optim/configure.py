"""Build the optimizer and the scheduler of any LightningModule."""

import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from textwrap import shorten
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.errors import UserError


def compile_layer_pattern(text: str) -> re.Pattern[str]:
    """Return the pattern of all tensors of the layers that a regular expression names: "conv.*", "net.fc", "fc.bias".

    The module's attribute that holds the network, such as "net", may be left out.
    """
    try:
        return re.compile(rf"([^.]+\.)?({text})(\..*)?")
    except re.error as error:
        raise UserError(f"{text}: not a regular expression ({error})") from error


def configure_optimizers(
    module: L.LightningModule,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[..., LRScheduler] | None,
) -> dict[str, Any]:
    """Return the result of LightningModule.configure_optimizers for a partial optimizer and scheduler.

    The optimizer may have the attribute `groups`: by name, `pattern`, a regular expression, and settings such as `lr`.
    The scheduler may have `monitor`, the metric that it depends on, and `interval`: "step", the default if it takes
    `total_steps`, or "epoch". It gets the number of training steps if it takes `total_steps`. Raises UserError.
    """
    groups = getattr(optimizer, "groups", None) or {}
    parameters: Any = _group_parameters(module, groups) if groups else module.parameters()
    built = optimizer(parameters)
    for name, settings in groups.items():
        if unknown := settings.keys() - {"pattern", *built.defaults}:
            raise UserError(f"optimizer.groups.{name}: no setting {unknown}; there are {', '.join(built.defaults)}")
    if scheduler is None:
        return {"optimizer": built}
    if any(isinstance(callback, LearningRateFinder) for callback in module.trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError("LearningRateFinder: a scheduler would not use the rate that it finds; set scheduler=none")
    keywords, arguments = getattr(scheduler, "keywords", {}), dict[str, Any]()
    if takes_steps := "total_steps" in signature(scheduler).parameters:
        arguments["total_steps"] = keywords.get("total_steps") or module.trainer.estimated_stepping_batches
    if groups and isinstance(peak := keywords.get("max_lr"), float | int):  # or all groups would have the same peak
        arguments["max_lr"] = [peak * group["lr"] / built.defaults["lr"] for group in built.param_groups]
    try:
        lr_scheduler = scheduler(built, **arguments)
    except ZeroDivisionError:  # OneCycleLR divides by the length of its first phase
        lr_scheduler = scheduler(built, **arguments | {"total_steps": arguments["total_steps"] + 1})
    except TypeError as error:  # an argument is missing
        raise UserError(f"scheduler: {error}") from error
    monitor = getattr(scheduler, "monitor", None)
    interval = getattr(scheduler, "interval", None) or ("step" if takes_steps else "epoch")
    result = {"scheduler": lr_scheduler, "name": "lr", "interval": interval, "monitor": monitor}
    if str(monitor).startswith("val") and interval == "epoch":  # not every epoch may have a validation
        result["frequency"] = module.trainer.check_val_every_n_epoch or 1  # type: ignore[attr-defined]
    return {"optimizer": built, "lr_scheduler": result}


def _group_parameters(module: nn.Module, groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return torch's parameter groups: a parameter belongs to the first whose pattern matches its name."""
    rest, result = dict(module.named_parameters()), []
    for name, settings in groups.items():
        pattern = settings.get("pattern", "")
        matched = list(filter(compile_layer_pattern(pattern).fullmatch, rest))
        if not matched:
            names = shorten(", ".join(rest), 200)
            raise UserError(f"optimizer.groups.{name}.pattern={pattern}: matches none of {names}")
        options = {key: value for key, value in settings.items() if key != "pattern"}
        result.append({"params": [rest.pop(key) for key in matched], "name": name, **options})
    return [*result, *([{"params": [*rest.values()], "name": "rest"}] if rest else [])]
