"""What every LightningModule here does with its optimizer and its schedule."""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

import lightning as L
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.errors import UserError


def with_scheduler(
    module: L.LightningModule,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[..., LRScheduler],
) -> dict[str, Any]:
    """For `configure_optimizers`: the schedule is stepped after every batch, and told how many if it asks."""
    built = optimizer(module.parameters())
    total = {"total_steps": int(module.trainer.estimated_stepping_batches)}
    takes_total = "total_steps" in signature(scheduler).parameters
    try:
        schedule = scheduler(built, **(total if takes_total else {}))
    except ZeroDivisionError as error:  # OneCycleLR, where its first phase has no step
        steps = total["total_steps"]
        raise UserError(f"{steps} steps are too few for the scheduler; use scheduler=constant") from error
    return {"optimizer": built, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}
