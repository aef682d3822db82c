"""Muon for convolutions; torch.optim.Muon takes matrices alone."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.values import NotNegative, Positive, Share


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[..., rows, columns] to about the nearest matrices whose singular values are all equal: 0.7 to 1.2.

    Newton and Schulz's iteration with the coefficients of https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimizer):
    """Steps of `lr` in the orthogonalised direction for kernels; SGD for all else, with `lr` · `others`.

    A kernel is the weight of a convolution with several input channels in each group, as a matrix of a row for each
    output channel. All have Nesterov momentum, and `lr` · `weight_decay` of their value taken off a step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: Positive = 0.1,
        momentum: Share = 0.95,
        weight_decay: NotNegative = 0.0,
        others: NotNegative = 0.2,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "others": others})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            kernels: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                buffer = state["momentum_buffer"].mul_(momentum).add_(parameter.grad)
                direction = parameter.grad.add(buffer, alpha=momentum)
                if parameter.ndim == 4 and parameter.shape[1] > 1:
                    kernels[parameter.shape].append((parameter, direction))
                else:
                    parameter.mul_(1 - lr * group["others"] * decay).add_(direction, alpha=-lr * group["others"])
            for shape, pairs in kernels.items():  # all of a shape at once: they are small, and the calls cost most
                matrices = orthogonalize(torch.stack([direction.flatten(1) for _, direction in pairs]))
                scale = max(1.0, matrices.shape[1] / matrices.shape[2]) ** 0.5
                for (kernel, _), matrix in zip(pairs, matrices, strict=True):
                    kernel.mul_(1 - lr * decay).add_(matrix.view(shape), alpha=-lr * scale)
        return loss
