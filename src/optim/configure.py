"""Build the optimizer and the scheduler of any LightningModule."""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Literal, NamedTuple

import lightning as L
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.errors import UserError


class Scheduler(NamedTuple):
    """A partial scheduler, when it steps, and the metric that it monitors, if any."""

    scheduler: Callable[..., LRScheduler]
    interval: Literal["step", "epoch"] | None = None  # None: "step" if it takes `total_steps`, otherwise "epoch"
    monitor: str | None = None


def configure_optimizers(
    module: L.LightningModule,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[..., LRScheduler] | Scheduler | None,
) -> dict[str, Any]:
    """Return the result of LightningModule.configure_optimizers for a partial optimizer and scheduler.

    A scheduler that takes `total_steps` gets the number of training steps. Raises UserError for invalid settings.
    """
    try:
        built = optimizer(module.parameters())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer: {error}") from error
    if scheduler is None:
        return {"optimizer": built}
    partial, interval, monitor = scheduler if isinstance(scheduler, Scheduler) else Scheduler(scheduler)
    takes_steps = "total_steps" in signature(partial).parameters
    steps = int(module.trainer.estimated_stepping_batches) if takes_steps else None
    try:
        schedule = partial(built, total_steps=steps) if takes_steps else partial(built)
    except ZeroDivisionError as error:  # OneCycleLR, if its first phase has no step
        raise UserError(f"{steps} steps are too few for the scheduler; set scheduler=none") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"scheduler: {error}") from error
    settings = {"interval": interval or ("step" if takes_steps else "epoch"), "monitor": monitor, "name": "lr"}
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, **{k: x for k, x in settings.items() if x}}}
