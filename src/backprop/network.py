"""The 2-2-2 sigmoid network that is small enough to differentiate by hand. The lesson is docs/backprop.md.

    i1 ──w1── h1 ──w5── o1          i inputs, h hidden, o output (weighted sums)
       ╲w3  ╱    ╲w7  ╱             a_h1 = σ(h1), and so on: the activations
        ╲  ╱      ╲  ╱              t targets, E errors
       ╱w2  ╲    ╱w6  ╲             biases only on request: b1 for both h, b2 for both o
    i2 ──w4── h2 ──w8── o2

For one sample, every quantity is a float64 scalar tensor, so that it can be compared with a number on paper.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn, sigmoid
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.errors import UserError
from src.core.value_types import PositiveFloat
from src.optim.configure import configure_optimizers

# The worked example.
INPUTS, TARGETS = (0.05, 0.10), (0.5, 0.5)
WEIGHTS = (0.15, 0.20, 0.25, 0.30, 0.40, 0.45, 0.50, 0.55)
NAMES = *(f"w{n}" for n in range(1, 9)), "b1", "b2"  # of the weights and biases


class Values(SimpleNamespace):
    """The numbers of one step by name: those given, then those that the functions below add in their order.

    dE_dw1 is ∂E_total/∂w1, and so on. The names, without the defaults here, are the columns of trace.csv.
    """

    b1: Any = 0.0  # a network without biases
    b2: Any = 0.0
    bug: Any = False  # whether to repeat the bug of the published spreadsheet

    def to_row(self) -> dict[str, float]:
        """Return the values as floats."""
        return {name: value.item() if isinstance(value, Tensor) else float(value) for name, value in vars(self).items()}


# E1 and E2 are not of the group "loss": the plots of a sweep draw every metric of that group.
GROUPS = {"E_total": "loss", "E": "error", "w": "weight", "b1": "weight", "b2": "weight", "d": "gradient"}
GROUPS |= dict.fromkeys("hoa", "neuron")


def get_group(name: str) -> str:
    """Return the group of a number, for its tag in TensorBoard and its colour in the workbook."""
    return GROUPS.get(name) or GROUPS.get(name[0], "setting")


# src.backprop.formulas writes the assignments of the next two functions as text.
def forward(v: Values) -> Values:
    """Compute the forward pass and the errors."""
    v.h1 = v.w1 * v.i1 + v.w2 * v.i2 + v.b1
    v.a_h1 = sigmoid(v.h1)
    v.h2 = v.w3 * v.i1 + v.w4 * v.i2 + v.b1
    v.a_h2 = sigmoid(v.h2)
    v.o1 = v.w5 * v.a_h1 + v.w6 * v.a_h2 + v.b2
    v.a_o1 = sigmoid(v.o1)
    v.o2 = v.w7 * v.a_h1 + v.w8 * v.a_h2 + v.b2
    v.a_o2 = sigmoid(v.o2)
    v.E1 = 0.5 * (v.t1 - v.a_o1) ** 2
    v.E2 = 0.5 * (v.t2 - v.a_o2) ** 2
    v.E_total = v.E1 + v.E2
    return v


def equations(v: Values) -> Values:
    """Compute the gradients by the chain rule, from the error back towards the inputs."""
    # ∂E/∂o (the delta δ) = ∂E/∂a_o · ∂a_o/∂o with ∂E/∂a_o = a_o − t and σ'(o) = a_o (1 − a_o).
    v.dE_do1 = (v.a_o1 - v.t1) * v.a_o1 * (1 - v.a_o1)
    v.dE_do2 = (v.a_o2 - v.t2) * v.a_o2 * (1 - v.a_o2)
    # Each hidden neuron collects error from both outputs.
    v.dE_da_h1 = v.dE_do1 * v.w5 + v.dE_do2 * v.w7
    v.dE_da_h2 = v.dE_do1 * v.w6 + v.dE_do2 * v.w8
    # ∂E/∂h = ∂E/∂a_h · ∂a_h/∂h with σ'(h) = a_h (1 − a_h). The bug has a_h1 where a_h2 belongs.
    v.dE_dh1 = v.dE_da_h1 * v.a_h1 * (1 - v.a_h1)
    v.dE_dh2 = v.dE_da_h2 * v.a_h1 * (1 - v.a_h1) if v.bug else v.dE_da_h2 * v.a_h2 * (1 - v.a_h2)
    # A weight enters one neuron: its gradient is that neuron's delta times the value that the weight multiplies.
    v.dE_dw1 = v.dE_dh1 * v.i1
    v.dE_dw2 = v.dE_dh1 * v.i2
    v.dE_dw3 = v.dE_dh2 * v.i1
    v.dE_dw4 = v.dE_dh2 * v.i2
    v.dE_dw5 = v.dE_do1 * v.a_h1
    v.dE_dw6 = v.dE_do1 * v.a_h2
    v.dE_dw7 = v.dE_do2 * v.a_h1
    v.dE_dw8 = v.dE_do2 * v.a_h2
    # A bias enters two neurons.
    if isinstance(v.b1, Tensor) and v.b1.requires_grad:
        v.dE_db1 = v.dE_dh1 + v.dE_dh2
        v.dE_db2 = v.dE_do1 + v.dE_do2
    return v


def autograd(v: Values) -> Values:
    """Let PyTorch compute what the equations compute."""
    names = [name for name in vars(equations(v)) if name.startswith("dE_d")]
    tensors = [getattr(v, name.removeprefix("dE_d")) for name in names]
    vars(v).update(zip(names, torch.autograd.grad(v.E_total, tensors), strict=True))
    return v


class GradientDescent(Optimizer):
    """Update w ← w − η · ∂E/∂w with two roundings, as on paper and in a spreadsheet.

    torch.optim.SGD fuses the product and the difference into one rounding if the CPU can, which changes the
    last bit of a few losses.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: PositiveFloat) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Tensor]) -> Tensor:  # type: ignore[override]
        loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        weight -= group["lr"] * weight.grad
        return loss


class BackpropNet(nn.Module):
    """Hold the weights, and the biases if there are any, as float64 scalars.

    Args:
        weights: w1 to w8.
        bias: b1 of both hidden neurons and b2 of both outputs; None for a network without biases.
        train_bias: False keeps the biases as they are, as in the well-known example that has two.
    """

    def __init__(
        self,
        weights: tuple[float, float, float, float, float, float, float, float] = WEIGHTS,
        bias: tuple[float, float] | None = None,
        train_bias: bool = True,
    ) -> None:
        super().__init__()
        for name, number in zip(NAMES, [*weights, *(bias or ())], strict=False):
            tensor = torch.tensor(number, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=train_bias or name[0] == "w"))


class BackpropModule(L.LightningModule):
    """Train the network on one sample; one step is one full batch.

    `rows` lists the numbers of every step with the weights before the update. The loggers get the same numbers at the
    count of the updates made before.
    """

    def __init__(
        self,
        net: BackpropNet,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        gradients: Literal["autograd", "equations", "spreadsheet"] = "equations",
    ) -> None:
        super().__init__()
        if not isinstance(net, BackpropNet):
            raise UserError("task=backprop trains model=backprop only; type experiment=backprop without model=")
        self.net, self.optimizer, self.scheduler, self.gradients = net, optimizer, scheduler, gradients
        self.rows: list[dict[str, float]] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = self.rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rows = checkpoint["rows"]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        (i1, i2), (t1, t2) = batch
        lr, bug = self.trainer.optimizers[0].param_groups[0]["lr"], self.gradients == "spreadsheet"
        v = Values(η=lr, bug=bug, i1=i1, i2=i2, t1=t1, t2=t2, **dict(self.net.named_parameters()))
        self.values = autograd(forward(v)) if self.gradients == "autograd" else equations(forward(v))
        self.rows.append(v.to_row())
        scalars = {f"{get_group(name)}/{name}": value for name, value in self.rows[-1].items()}
        for logger in self.loggers:
            logger.log_metrics(scalars, self.global_step)
        self.log("loss/E_total", v.E_total, logger=False)
        return v.E_total

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        for name, weight in self.net.named_parameters():
            if weight.requires_grad:
                weight.grad = getattr(self.values, f"dE_d{name}").detach()

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)
