"""What every LightningModule here does with its optimizer and its schedule."""

from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any, Literal

import lightning as L
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.errors import UserError


class Scheduler:
    """A scheduler that awaits its optimizer, and after what it is stepped: each "step" or each "epoch".

    By default a schedule that is told the number of steps counts steps, and any other epochs, as PyTorch's do.
    `monitor` is the metric that it looks at, if it does.
    """

    def __init__(
        self,
        scheduler: Callable[..., LRScheduler],
        interval: Literal["step", "epoch"] | None = None,
        monitor: str | None = None,
    ) -> None:
        self.scheduler, self.monitor = scheduler, monitor
        self.counts_steps = "total_steps" in signature(scheduler).parameters
        self.interval = interval or ("step" if self.counts_steps else "epoch")

    def __call__(self, optimizer: Optimizer, **settings: Any) -> LRScheduler:
        return self.scheduler(optimizer, **settings)


def configure_optimizers(
    module: L.LightningModule,
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
    scheduler: Callable[..., LRScheduler] | None,
) -> Any:
    """For `configure_optimizers`. A schedule is told the number of steps if it asks for `total_steps`.

    Raises UserError for what either refuses.
    """
    try:
        built = optimizer(module.parameters())
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"optimizer: {error}") from error
    if scheduler is None:
        return built
    schedule = scheduler if isinstance(scheduler, Scheduler) else Scheduler(scheduler)
    total = {"total_steps": int(module.trainer.estimated_stepping_batches)} if schedule.counts_steps else {}
    try:
        made = schedule(built, **total)
    except ZeroDivisionError as error:  # OneCycleLR, where its first phase has no step
        raise UserError(f"{total['total_steps']} steps are too few for the scheduler; use scheduler=none") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"scheduler: {error}") from error
    how = {"interval": schedule.interval, "monitor": schedule.monitor, "name": "lr"}
    return {"optimizer": built, "lr_scheduler": {"scheduler": made, **{k: v for k, v in how.items() if v}}}
