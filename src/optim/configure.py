"""Build the optimizer and the scheduler of any LightningModule."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from inspect import signature
from textwrap import shorten
from typing import Any, Literal, NamedTuple, NoReturn

import lightning as L
from lightning.pytorch.callbacks import LearningRateFinder
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.config import find_closest
from src.core.errors import UserError


class GroupedOptimizer(NamedTuple):
    """A partial optimizer with parameter groups by name: `pattern`, a regular expression, and settings such as `lr`."""

    factory: Callable[..., Optimizer]
    groups: Mapping[str, Mapping[str, Any]]

    def __call__(self, params: Any) -> NoReturn:
        raise UserError("optimizer.groups: needs names; the task must call src.optim.configure.configure_optimizers")


class SchedulerConfig(NamedTuple):
    """A partial scheduler, when it steps, and the metric that it monitors, if any."""

    scheduler: Callable[..., LRScheduler]
    interval: Literal["step", "epoch"] | None = None  # None: "step" if it takes `total_steps`, otherwise "epoch"
    monitor: str | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> LRScheduler:
        return self.scheduler(*arguments, **keywords)


def compile_layer_pattern(text: str) -> re.Pattern[str]:
    """Return the pattern of all tensors of the layers that a regular expression names: "conv.*", "net.fc", "fc.bias".

    The module's attribute that holds the network, such as "net", may be left out.
    """
    return re.compile(rf"([^.]+\.)?({text})(\..*)?")


def configure_optimizers(
    module: L.LightningModule,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | GroupedOptimizer,
    scheduler: Callable[..., LRScheduler] | SchedulerConfig | None,
) -> dict[str, Any]:
    """Return the result of LightningModule.configure_optimizers for a partial optimizer and scheduler.

    A scheduler that takes `total_steps` gets the number of training steps if it is not set. Raises UserError for
    invalid settings.
    """
    factory, groups = optimizer if isinstance(optimizer, GroupedOptimizer) else (optimizer, {})
    try:
        parameters: Any = _group_parameters(module, groups) if groups else module.parameters()
        built = factory(parameters)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer: {error}") from error
    for name, settings in groups.items():
        if unknown := next((key for key in settings if key not in ("pattern", *built.defaults)), None):
            hint = find_closest(unknown, list(built.defaults)) or ", ".join(built.defaults)
            raise UserError(f"optimizer.groups.{name}.{unknown}: no such setting; did you mean {hint}?")
    if scheduler is None:
        return {"optimizer": built}
    if any(isinstance(callback, LearningRateFinder) for callback in module.trainer.callbacks):  # type: ignore[attr-defined]
        raise UserError("LearningRateFinder: a scheduler would not use the rate that it finds; set scheduler=none")
    config = scheduler if isinstance(scheduler, SchedulerConfig) else SchedulerConfig(scheduler)
    takes_steps = "total_steps" in signature(config.scheduler).parameters
    keywords, arguments = getattr(config.scheduler, "keywords", {}), dict[str, Any]()
    if takes_steps and "epochs" not in keywords:
        steps = module.trainer.estimated_stepping_batches
        total = keywords.get("total_steps") or steps
        if total < steps or total == math.inf:
            fix = "set trainer.max_epochs, trainer.max_steps or scheduler=none"
            raise UserError(f"scheduler.total_steps={total}: the run has {steps} steps; {fix}")
        arguments["total_steps"] = int(total)
    peak = keywords.get("max_lr")
    if groups and isinstance(peak, float | int):  # one number would give all groups the same peak
        arguments["max_lr"] = [peak * group["lr"] / built.defaults["lr"] for group in built.param_groups]
    try:
        try:
            lr_scheduler = config.scheduler(built, **arguments)
        except ZeroDivisionError:  # OneCycleLR divides by the length of its first phase
            lr_scheduler = config.scheduler(built, **arguments | {"total_steps": arguments.get("total_steps", 0) + 1})
    except (TypeError, ValueError) as error:
        raise UserError(f"scheduler: {error}") from error
    interval = config.interval or ("step" if takes_steps else "epoch")
    settings = {"scheduler": lr_scheduler, "name": "lr", "interval": interval, "monitor": config.monitor}
    if str(config.monitor).startswith("val") and interval == "epoch":  # not every epoch may have a validation
        settings["frequency"] = module.trainer.check_val_every_n_epoch or 1  # type: ignore[attr-defined]
    return {"optimizer": built, "lr_scheduler": settings}


def _group_parameters(module: nn.Module, groups: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return torch's parameter groups: a parameter belongs to the first whose pattern matches its name."""
    rest, result = dict(module.named_parameters()), []
    for name, settings in groups.items():
        try:
            pattern = compile_layer_pattern(settings["pattern"])
        except (TypeError, KeyError, re.error) as error:
            raise UserError(f"optimizer.groups.{name}: needs pattern, a regular expression ({error!r})") from error
        if not (matched := list(filter(pattern.fullmatch, rest))):
            names = shorten(", ".join(rest), 200)
            raise UserError(f"optimizer.groups.{name}.pattern={settings['pattern']}: matches none of {names}")
        options = {key: value for key, value in settings.items() if key != "pattern"}
        result.append({"params": [rest.pop(key) for key in matched], "name": name, **options})
    return [*result, *([{"params": [*rest.values()], "name": "rest"}] if rest else [])]
