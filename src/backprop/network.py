"""The 2-2-2 sigmoid network that is small enough to differentiate by hand. The lesson: docs/backprop.md.

    i1 ──w1── h1 ──w5── o1          i inputs, h hidden, o output
       ╲w3  ╱    ╲w7  ╱             a_h1 = σ(h1), and so on: what a neuron sends on
        ╲  ╱      ╲  ╱              t targets, E errors
       ╱w2  ╲    ╱w6  ╲             no biases
    i2 ──w4── h2 ──w8── o2

Everything is float64 and, for one sample, every quantity is a scalar tensor of its own, so that a number here
can be compared with a number on paper.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from src.core.errors import UserError, parse_finite_numbers
from src.core.value_types import PositiveFloat
from src.optim.configure import configure_optimizers

# The worked example.
INPUTS = (0.05, 0.10)
TARGETS = (0.5, 0.5)
WEIGHTS = (0.15, 0.20, 0.25, 0.30, 0.40, 0.45, 0.50, 0.55)

# The columns of the worked sheet; dE_dw1 is ∂E_total/∂w1.
COLUMNS = (
    *("t1", "t2", "i1", "i2", "w1", "w2", "w3", "w4", "h1", "a_h1", "h2", "a_h2"),
    *("w5", "w6", "w7", "w8", "o1", "a_o1", "o2", "a_o2", "E1", "E2", "E_total"),
    *("dE_dw1", "dE_dw2", "dE_dw3", "dE_dw4", "dE_dw5", "dE_dw6", "dE_dw7", "dE_dw8"),
)


class Weights(NamedTuple):
    """One value a weight: the weights themselves, or ∂E_total/∂w for each of them."""

    w1: Tensor
    w2: Tensor
    w3: Tensor
    w4: Tensor
    w5: Tensor
    w6: Tensor
    w7: Tensor
    w8: Tensor


class Activations(NamedTuple):
    """Every intermediate value of one forward pass, in the order in which it is computed."""

    h1: Tensor
    a_h1: Tensor
    h2: Tensor
    a_h2: Tensor
    o1: Tensor
    a_o1: Tensor
    o2: Tensor
    a_o2: Tensor
    E1: Tensor
    E2: Tensor
    E_total: Tensor


def forward(w: Weights, inputs: Tensor, targets: Tensor) -> Activations:
    """`inputs` and `targets` have shape (2,)."""
    i1, i2 = inputs
    t1, t2 = targets
    h1 = w.w1 * i1 + w.w2 * i2
    h2 = w.w3 * i1 + w.w4 * i2
    a_h1 = torch.sigmoid(h1)
    a_h2 = torch.sigmoid(h2)
    o1 = w.w5 * a_h1 + w.w6 * a_h2
    o2 = w.w7 * a_h1 + w.w8 * a_h2
    a_o1 = torch.sigmoid(o1)
    a_o2 = torch.sigmoid(o2)
    E1 = 0.5 * (t1 - a_o1) ** 2
    E2 = 0.5 * (t2 - a_o2) ** 2
    return Activations(h1, a_h1, h2, a_h2, o1, a_o1, o2, a_o2, E1, E2, E_total=E1 + E2)


def output_deltas(a: Activations, targets: Tensor) -> tuple[Tensor, Tensor]:
    """∂E_total/∂o1 and ∂E_total/∂o2: how the error answers to the sums that enter the output neurons."""
    t1, t2 = targets
    # ∂E/∂o = ∂E/∂a_o · ∂a_o/∂o, where ∂E/∂a_o = a_o − t and σ'(o) = a_o (1 − a_o)
    dE_do1 = (a.a_o1 - t1) * a.a_o1 * (1 - a.a_o1)
    dE_do2 = (a.a_o2 - t2) * a.a_o2 * (1 - a.a_o2)
    return dE_do1, dE_do2


def hidden_errors(w: Weights, dE_do1: Tensor, dE_do2: Tensor) -> tuple[Tensor, Tensor]:
    """∂E_total/∂a_h1 and ∂E_total/∂a_h2: each hidden neuron feeds both outputs, so both send it a share."""
    dE_da_h1 = dE_do1 * w.w5 + dE_do2 * w.w7
    dE_da_h2 = dE_do1 * w.w6 + dE_do2 * w.w8
    return dE_da_h1, dE_da_h2


def equations(w: Weights, a: Activations, inputs: Tensor, targets: Tensor) -> Weights:
    """The eight gradients by the chain rule."""
    i1, i2 = inputs
    dE_do1, dE_do2 = output_deltas(a, targets)
    dE_da_h1, dE_da_h2 = hidden_errors(w, dE_do1, dE_do2)
    dE_dh1 = dE_da_h1 * (a.a_h1 * (1 - a.a_h1))  # ∂E/∂h = ∂E/∂a_h · σ'(h), where σ'(h) = a_h (1 − a_h)
    dE_dh2 = dE_da_h2 * (a.a_h2 * (1 - a.a_h2))
    return Weights(
        w1=dE_dh1 * i1,  # ∂E/∂w1 = ∂E/∂h1 · i1
        w2=dE_dh1 * i2,  # ∂E/∂w2 = ∂E/∂h1 · i2
        w3=dE_dh2 * i1,  # ∂E/∂w3 = ∂E/∂h2 · i1
        w4=dE_dh2 * i2,  # ∂E/∂w4 = ∂E/∂h2 · i2
        w5=dE_do1 * a.a_h1,  # ∂E/∂w5 = ∂E/∂o1 · a_h1
        w6=dE_do1 * a.a_h2,  # ∂E/∂w6 = ∂E/∂o1 · a_h2
        w7=dE_do2 * a.a_h1,  # ∂E/∂w7 = ∂E/∂o2 · a_h1
        w8=dE_do2 * a.a_h2,  # ∂E/∂w8 = ∂E/∂o2 · a_h2
    )


def spreadsheet(w: Weights, a: Activations, inputs: Tensor, targets: Tensor) -> Weights:
    """`equations` with the slip of the published spreadsheet, whose curves it reproduces to the last bit.

    Its ∂E/∂w3 and ∂E/∂w4 multiply by a_h1 (1 − a_h1) where a_h2 (1 − a_h2) belongs.
    """
    i1, i2 = inputs
    _, dE_da_h2 = hidden_errors(w, *output_deltas(a, targets))
    slipped = dE_da_h2 * (a.a_h1 * (1 - a.a_h1))
    return equations(w, a, inputs, targets)._replace(w3=slipped * i1, w4=slipped * i2)


def sheet_row(w: Weights, a: Activations, gradients: Weights, inputs: Tensor, targets: Tensor) -> dict[str, float]:
    """One line of the worked sheet, in the order of COLUMNS."""
    (i1, i2), (t1, t2) = inputs, targets
    named = {"i1": i1, "i2": i2, "t1": t1, "t2": t2, **w._asdict(), **a._asdict()}
    named |= {f"dE_d{name}": gradient for name, gradient in gradients._asdict().items()}
    return {name: named[name].item() for name in COLUMNS}


# How `BackpropModule` may find its gradients; None leaves them to PyTorch.
HandGradients = Callable[[Weights, Activations, Tensor, Tensor], Weights]
GRADIENTS: dict[str, HandGradients | None] = {
    "autograd": None,
    "equations": equations,
    "spreadsheet": spreadsheet,
}


class GradientDescent(Optimizer):
    """w ← w − η · ∂E/∂w with two roundings, as on paper and in a spreadsheet.

    torch.optim.SGD fuses the product and the difference into one rounding where the CPU can, which moves a
    few of the losses by their last bit.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: PositiveFloat) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                weight -= group["lr"] * weight.grad
        return loss


class BackpropNet(nn.Module):
    """Eight parameters w1 to w8, each a float64 scalar.

    Raises UserError unless `weights` are eight finite numbers.
    """

    def __init__(self, weights: Sequence[float] = WEIGHTS) -> None:
        super().__init__()
        numbers = parse_finite_numbers("model.weights", weights, Weights._fields)
        for name, number in zip(Weights._fields, numbers, strict=True):
            self.register_parameter(name, nn.Parameter(torch.tensor(number, dtype=torch.float64)))

    @property
    def weights(self) -> Weights:
        return Weights(*self.parameters())

    @property
    def gradients(self) -> Weights:
        """What `backward` has left, ∂E_total/∂w."""
        return Weights(*(weight.grad for weight in self.parameters()))  # type: ignore[arg-type]

    def forward(self, inputs: Tensor | None = None, targets: Tensor | None = None) -> Activations:
        """`inputs` and `targets`, both of shape (2,), are the worked example's unless given."""
        inputs = torch.tensor(INPUTS, dtype=torch.float64) if inputs is None else inputs
        targets = torch.tensor(TARGETS, dtype=torch.float64) if targets is None else targets
        return forward(self.weights, inputs, targets)


class BackpropModule(L.LightningModule):
    """Gradient descent on one sample, so one step is one full batch. `gradients` is a key of GRADIENTS.

    After each step `row` holds its line of the worked sheet, by COLUMNS: the weights are those before the
    update. All of it goes to the loggers, at the number of updates made before.
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
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.gradients = gradients
        self.row: dict[str, float] = {}

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.sample = batch
        self.activations = self.net(*batch)
        return self.activations.E_total

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        by_hand = GRADIENTS[self.gradients]
        if by_hand is None:
            loss.backward()
            return
        with torch.no_grad():
            gradients = by_hand(self.net.weights, self.activations, *self.sample)
        for weight, gradient in zip(self.net.weights, gradients, strict=True):
            weight.grad = gradient

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        a = self.activations
        self.row = sheet_row(self.net.weights, a, self.net.gradients, *self.sample)
        groups = {
            "loss": ("E_total",),
            "error": ("E1", "E2"),  # not "loss": a sweep draws whatever is called that
            "neuron": ("h1", "a_h1", "h2", "a_h2", "o1", "a_o1", "o2", "a_o2"),
            "weight": Weights._fields,
            "gradient": tuple(f"dE_d{name}" for name in Weights._fields),
        }
        scalars = {f"{group}/{name}": self.row[name] for group, names in groups.items() for name in names}
        for logger in self.loggers:
            logger.log_metrics(scalars, self.global_step)
        self.log_dict({"error/E1": a.E1, "error/E2": a.E2, "loss/E_total": a.E_total}, logger=False)

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)
