"""Muon for convolutions; torch.optim.Muon takes matrices alone."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.core.value_types import NonNegativeFloat, PositiveFloat, Probability

SMALL = 2**16  # numbers in a kernel: of larger ones the arithmetic costs more than the calls


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """[..., rows, columns] to about the nearest matrices whose singular values are all equal: 0.7 to 1.2.

    Newton and Schulz's iteration with the coefficients of https://kellerjordan.github.io/posts/muon/.
    Rows and columns of zeros stay so.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.view(shape)
    return x.mT if tall else x


class Muon(Optimizer):
    """Steps of `lr` in the orthogonalised direction for kernels; SGD for all else, with `lr` · `sgd_lr_ratio`.

    A kernel is the weight of a convolution with several input channels in each group, as a matrix of a row for each
    output channel. All have Nesterov momentum, and `lr` · `weight_decay` of their value taken off a step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: PositiveFloat = 0.1,
        momentum: Probability = 0.95,
        weight_decay: NonNegativeFloat = 0.0,
        sgd_lr_ratio: NonNegativeFloat = 0.2,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "sgd_lr_ratio": sgd_lr_ratio}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum, decay = group["lr"], group["momentum"], group["weight_decay"]
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            gradients = [parameter.grad for parameter in parameters]
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
            directions = torch._foreach_add(gradients, buffers, alpha=momentum)
            pairs = list(zip(parameters, directions, strict=True))
            kernels = [pair for pair in pairs if pair[0].ndim == 4 and pair[0].shape[1] > 1]
            others = [pair for pair in pairs if pair[0].ndim != 4 or pair[0].shape[1] == 1]
            _descend(others, lr * group["sgd_lr_ratio"], decay)
            _descend(_orthogonal(kernels), lr, decay)
        return loss


def _descend(pairs: list[tuple[Tensor, Tensor]], lr: float | Tensor, decay: float) -> None:
    """`lr` in the direction that each parameter is paired with."""
    if not pairs:
        return
    parameters, directions = (list(each) for each in zip(*pairs, strict=True))
    keep: float | Tensor = 1 - lr * decay
    if isinstance(lr, Tensor) and isinstance(keep, Tensor):  # in a CUDA graph; rounded as the numbers would be
        lr, keep = lr.to(directions[0].dtype), keep.to(directions[0].dtype)
    if decay:
        torch._foreach_mul_(parameters, keep)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(parameters, directions)


def _orthogonal(kernels: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """All of a shape at once, for they are small and the calls cost most; on a GPU all small ones, with zeros."""
    found, batches = [], defaultdict(list)
    for kernel, direction in kernels:
        alone = direction.device.type == "cpu" or direction.numel() > SMALL
        batches[direction.shape if alone else None].append((kernel, direction))
    for pairs in batches.values():
        matrices = [direction.flatten(1) for _, direction in pairs]
        wide = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
        rows, columns = (max(sizes) for sizes in zip(*(matrix.shape for matrix in wide), strict=True))
        batch = wide[0].new_zeros(len(wide), rows, columns)
        for place, matrix in zip(batch, wide, strict=True):
            place[: matrix.shape[0], : matrix.shape[1]] = matrix
        for (kernel, _), matrix, place, before in zip(pairs, matrices, orthogonalize(batch), wide, strict=True):
            direction = place[: before.shape[0], : before.shape[1]]
            tall = matrix.shape[0] / matrix.shape[1]
            found.append((kernel, (direction.mT * tall**0.5 if tall > 1 else direction).reshape(kernel.shape)))
    return found
