"""Gradient descent on the worked example as a function of the learning rate, hundreds of them in one run."""

from typing import NamedTuple

import torch
from torch import Tensor

from src.models.backprop import GRADIENTS, INPUTS, TARGETS, WEIGHTS, Weights, equations, forward

SAMPLE = torch.tensor(INPUTS, dtype=torch.float64), torch.tensor(TARGETS, dtype=torch.float64)


def descend(lr: Tensor, steps: int, gradients: str = "equations") -> tuple[Tensor, Tensor]:
    """The losses of `steps` steps, shape [len(lr), steps], and the weights after them, [len(lr), 8]."""

    def run(rate: Tensor) -> tuple[Tensor, Tensor]:
        w = Weights(*torch.tensor(WEIGHTS, dtype=torch.float64))
        losses = []
        for _ in range(steps):
            values = forward(w, *SAMPLE)
            losses.append(values.E_total)
            slopes = (GRADIENTS[gradients] or equations)(w, values, *SAMPLE)
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


def past_two() -> PastTwo:
    """How large a step may be.

    `limit` is 2/λ, where λ is the largest eigenvalue of the Hessian at the minimum that small steps reach: a
    minimum attracts gradient descent only while η < 2/λ. `first_rise` is the smallest rate whose loss rises
    somewhere in 1,000 steps, and `stuck` the smallest above `limit` whose loss is still above 0.1 after them.
    """
    rates = torch.logspace(-2, 4, 1201, dtype=torch.float64)
    losses, _ = descend(rates, 1000)
    _, (weights,) = descend(torch.tensor([1.0], dtype=torch.float64), 1000)
    hessian = torch.func.hessian(lambda w: forward(Weights(*w), *SAMPLE).E_total)(weights)
    limit = 2 / torch.linalg.eigvalsh(hessian)[-1].item()
    # Rounding alone moves a loss that has arrived by less than this.
    rises = (losses.diff() > 1e-20).any(dim=1)
    stuck = (losses[:, -1] > 0.1) & (rates > limit)
    return PastTwo(rates, losses, limit, rates[rises].min().item(), rates[stuck].min().item())
