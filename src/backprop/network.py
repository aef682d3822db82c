"""The 2-2-2 sigmoid network that is small enough to differentiate by hand. The lesson is docs/backprop.md.

    i1 ──w1── h1 ──w5── o1          i inputs, h hidden, o output (weighted sums)
       ╲w3  ╱    ╲w7  ╱             a_h1 = σ(h1), and so on: the activations
        ╲  ╱      ╲  ╱              t targets, E errors
       ╱w2  ╲    ╱w6  ╲             biases only on request: b1 for both h, b2 for both o
    i2 ──w4── h2 ──w8── o2

For one sample, every quantity is a float64 scalar tensor, so that it can be compared with a number on paper.
"""

from collections import namedtuple
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.errors import UserError
from src.core.value_types import PositiveFloat
from src.optim.configure import configure_optimizers

# The worked example.
INPUTS, TARGETS = (0.05, 0.10), (0.5, 0.5)
WEIGHTS = (0.15, 0.20, 0.25, 0.30, 0.40, 0.45, 0.50, 0.55)

# One tensor per weight: the weights themselves, or ∂E_total/∂w of each weight. A network without biases has zeros.
Weights = namedtuple("Weights", "w1 w2 w3 w4 w5 w6 w7 w8 b1 b2", defaults=(0.0, 0.0))
# Every intermediate value of one forward pass, in the order of the computation.
Activations = namedtuple("Activations", "h1 a_h1 h2 a_h2 o1 a_o1 o2 a_o2 E1 E2 E_total")

# The columns of trace.csv and of the workbook, by layer; dE_dw1 is ∂E_total/∂w1. Those of biases are optional.
COLUMNS = (
    *("t1", "t2", "i1", "i2"),
    *(*Weights._fields[:4], "b1", *Activations._fields[:4]),
    *(*Weights._fields[4:8], "b2", *Activations._fields[4:]),
    *(f"dE_d{name}" for name in Weights._fields),
)


def forward(w: Weights, inputs: Tensor, targets: Tensor) -> Activations:
    """Compute the forward pass and the errors; `inputs` and `targets` have shape (2,)."""
    i1, i2 = inputs
    t1, t2 = targets
    h1 = w.w1 * i1 + w.w2 * i2 + w.b1
    h2 = w.w3 * i1 + w.w4 * i2 + w.b1
    a_h1, a_h2 = torch.sigmoid(h1), torch.sigmoid(h2)
    o1 = w.w5 * a_h1 + w.w6 * a_h2 + w.b2
    o2 = w.w7 * a_h1 + w.w8 * a_h2 + w.b2
    a_o1, a_o2 = torch.sigmoid(o1), torch.sigmoid(o2)
    E1 = 0.5 * (t1 - a_o1) ** 2
    E2 = 0.5 * (t2 - a_o2) ** 2
    return Activations(h1, a_h1, h2, a_h2, o1, a_o1, o2, a_o2, E1, E2, E_total=E1 + E2)


def output_deltas(a: Activations, targets: Any) -> tuple[Any, Any]:
    """Compute ∂E_total/∂o1 and ∂E_total/∂o2 (the deltas δ) from tensors or floats."""
    t1, t2 = targets
    # ∂E/∂o = ∂E/∂a_o · ∂a_o/∂o with ∂E/∂a_o = a_o − t and σ'(o) = a_o (1 − a_o).
    dE_do1 = (a.a_o1 - t1) * a.a_o1 * (1 - a.a_o1)
    dE_do2 = (a.a_o2 - t2) * a.a_o2 * (1 - a.a_o2)
    return dE_do1, dE_do2


def hidden_errors(w: Weights, dE_do1: Any, dE_do2: Any) -> tuple[Any, Any]:
    """Compute ∂E_total/∂a_h1 and ∂E_total/∂a_h2: each hidden neuron collects error from both outputs."""
    dE_da_h1 = dE_do1 * w.w5 + dE_do2 * w.w7
    dE_da_h2 = dE_do1 * w.w6 + dE_do2 * w.w8
    return dE_da_h1, dE_da_h2


def hidden_deltas(a: Activations, dE_da_h1: Any, dE_da_h2: Any, has_bug: bool = False) -> tuple[Any, Any]:
    """Compute ∂E_total/∂h1 and ∂E_total/∂h2; the spreadsheet's bug has a_h1 where a_h2 belongs."""
    # ∂E/∂h = ∂E/∂a_h · ∂a_h/∂h with σ'(h) = a_h (1 − a_h).
    slope1, slope2 = a.a_h1 * (1 - a.a_h1), a.a_h2 * (1 - a.a_h2)
    return dE_da_h1 * slope1, dE_da_h2 * (slope1 if has_bug else slope2)


def equations(w: Weights, a: Activations, inputs: Tensor, targets: Tensor, has_bug: bool = False) -> Weights:
    """Compute the eight gradients by the chain rule, and those of learned biases."""
    i1, i2 = inputs
    dE_do1, dE_do2 = output_deltas(a, targets)
    dE_dh1, dE_dh2 = hidden_deltas(a, *hidden_errors(w, dE_do1, dE_do2), has_bug)
    # A weight enters one neuron: its gradient is that neuron's delta times the value that the weight multiplies.
    into_hidden = dE_dh1 * i1, dE_dh1 * i2, dE_dh2 * i1, dE_dh2 * i2
    into_output = dE_do1 * a.a_h1, dE_do1 * a.a_h2, dE_do2 * a.a_h1, dE_do2 * a.a_h2
    # A bias enters two neurons.
    into_biases = (dE_dh1 + dE_dh2, dE_do1 + dE_do2) if is_learned(w.b1) else ()
    return Weights(*into_hidden, *into_output, *into_biases)


def is_learned(weight: Any) -> bool:
    """Return whether gradient descent changes the weight or bias."""
    return isinstance(weight, Tensor) and weight.requires_grad


# The bug of the published spreadsheet, to reproduce its losses bitwise.
spreadsheet: Callable[..., Weights] = partial(equations, has_bug=True)


def make_row(w: Weights, a: Activations, gradients: Weights, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the numbers of one step by their names in COLUMNS, without those of biases that the network lacks."""
    (i1, i2), (t1, t2) = inputs, targets
    tensors = {"i1": i1, "i2": i2, "t1": t1, "t2": t2, **w._asdict(), **a._asdict()}
    tensors |= {f"dE_d{name}": gradient for name, gradient in gradients._asdict().items()}
    return {name: tensors[name].item() for name in COLUMNS if isinstance(tensors[name], Tensor)}


def autograd(w: Weights, a: Activations, inputs: Tensor, targets: Tensor) -> Weights:
    """Let PyTorch compute the gradients."""
    return Weights(*torch.autograd.grad(a.E_total, [weight for weight in w if is_learned(weight)]))


GRADIENTS = {"autograd": autograd, "equations": equations, "spreadsheet": spreadsheet}


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
        for name, number in zip(Weights._fields, [*weights, *(bias or ())], strict=False):
            tensor = torch.tensor(number, dtype=torch.float64)
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=train_bias or name[0] == "w"))


class BackpropModule(L.LightningModule):
    """Train the network on one sample with gradients from one of GRADIENTS; one step is one full batch.

    `rows` lists the numbers of every step (COLUMNS, and the learning rate η) with the weights before the update.
    The loggers get the same numbers at the count of the updates made before.
    """

    def __init__(
        self,
        net: BackpropNet,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        gradients: str = "equations",
    ) -> None:
        super().__init__()
        if gradients not in GRADIENTS:
            raise UserError(f"task.gradients={gradients}: must be one of {', '.join(GRADIENTS)}")
        if not isinstance(net, BackpropNet):
            raise UserError("task=backprop trains model=backprop only; type experiment=backprop without model=")
        self.net, self.optimizer, self.scheduler, self.gradients = net, optimizer, scheduler, gradients
        self.rows: list[dict[str, float]] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["rows"] = self.rows

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.rows = checkpoint["rows"]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        w = Weights(*self.net.parameters())
        a = forward(w, *batch)
        self.computed_gradients = GRADIENTS[self.gradients](w, a, *batch)
        row = make_row(w, a, self.computed_gradients, *batch)
        # E1 and E2 are not of the group "loss": the plots of a sweep draw every metric of that group.
        groups = {"loss": ["E_total"], "error": ["E1", "E2"], "neuron": Activations._fields[:8]}
        groups |= {"weight": Weights._fields, "gradient": [f"dE_d{name}" for name in Weights._fields]}
        scalars = {f"{group}/{name}": row[name] for group, names in groups.items() for name in names if name in row}
        for logger in self.loggers:
            logger.log_metrics(scalars, self.global_step)
        self.log_dict({"error/E1": a.E1, "error/E2": a.E2, "loss/E_total": a.E_total}, logger=False)
        self.rows.append(row | {"η": self.trainer.optimizers[0].param_groups[0]["lr"]})
        return a.E_total

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        for name, weight in self.net.named_parameters():
            if weight.requires_grad:
                weight.grad = getattr(self.computed_gradients, name).detach()

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)
