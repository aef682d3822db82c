"""Gradient descent on the worked example as a function of the learning rate, hundreds of them in one run."""

from typing import NamedTuple

import torch
from torch import Tensor

from src.backprop.network import INPUTS, TARGETS, WEIGHTS, GradientFunction, Weights, equations, forward

SAMPLE = torch.tensor(INPUTS, dtype=torch.float64), torch.tensor(TARGETS, dtype=torch.float64)


def descend(lr: Tensor, steps: int, gradients: GradientFunction = equations) -> tuple[Tensor, Tensor]:
    """The losses of `steps` steps, shape [len(lr), steps], and the weights after them, [len(lr), 8]."""

    def run(rate: Tensor) -> tuple[Tensor, Tensor]:
        w = Weights(*torch.tensor(WEIGHTS, dtype=torch.float64))
        losses = []
        for _ in range(steps):
            values = forward(w, *SAMPLE)
            losses.append(values.E_total)
            slopes = gradients(w, values, *SAMPLE)
            w = Weights(*(weight - rate * slope for weight, slope in zip(w, slopes, strict=True)))
        return torch.stack(losses), torch.stack(w)

    return torch.func.vmap(run)(lr)


class PastTwo(NamedTuple):
    """See `past_two`."""

    rates: Tensor  # shape [n]
    losses: Tensor  # shape [n, 1000]
    limit: float
    first_rise: float
    stuck: float
    flatter: float


def step_limit(weights: Tensor) -> float:
    """2/λ, where λ is the largest eigenvalue of the Hessian of E_total at `weights`, of shape (8,).

    A minimum there attracts gradient descent only while η is below it.
    """
    hessian = torch.autograd.functional.hessian(lambda w: forward(Weights(*w), *SAMPLE).E_total, weights)
    return 2 / torch.linalg.eigvalsh(hessian)[-1].item()


def past_two() -> PastTwo:
    """How large a step may be.

    `limit` is the `step_limit` of the minimum that η = 1 reaches. `first_rise` is the smallest rate whose
    loss rises somewhere in 1,000 steps, and `stuck` the smallest above `limit` whose loss is still above 0.1
    then. `flatter` is the `step_limit` where η = 500 arrives.
    """
    rates = torch.logspace(-2, 4, 1201, dtype=torch.float64)
    losses, _ = descend(rates, 1000)
    _, (small, large) = descend(torch.tensor([1.0, 500.0], dtype=torch.float64), 1000)
    limit = step_limit(small)
    # Rounding alone moves a loss that has arrived by less than this.
    rises = (losses.diff() > 1e-20).any(dim=1)
    stuck = (losses[:, -1] > 0.1) & (rates > limit)
    return PastTwo(rates, losses, limit, rates[rises].min().item(), rates[stuck].min().item(), step_limit(large))
