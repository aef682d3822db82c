"""Muon for convolutions; torch.optim.Muon takes only matrices."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from src.core.value_types import NonNegativeFloat, PositiveFloat, Probability

MAX_BATCHED_SIZE = 2**16  # numbers per kernel: above, arithmetic takes longer than launching it


def orthogonalize(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return about the nearest [..., rows, columns] matrices with singular values of 0.7 to 1.2; zeros stay zeros.

    Newton-Schulz iteration with the coefficients of https://kellerjordan.github.io/posts/muon/.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if is_tall else matrices
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.view(shape).mT if is_tall else x.view(shape)


class Muon(Optimizer):
    """Muon for convolution kernels, Nesterov SGD with `lr` · `sgd_lr_ratio` for the other parameters.

    Kernels with one input channel per group count as others. All lose `lr` · `weight_decay` of their value per step.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: PositiveFloat = 0.1,
        momentum: Probability = 0.95,
        weight_decay: NonNegativeFloat = 0.0,
        sgd_lr_ratio: NonNegativeFloat = 0.2,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "sgd_lr_ratio": sgd_lr_ratio}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            gradients = [parameter.grad for parameter in parameters]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            directions = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            is_kernel = [parameter.ndim == 4 and parameter.shape[1] > 1 for parameter in parameters]
            kernels, others = ([i for i, x in enumerate(is_kernel) if x == wanted] for wanted in (True, False))
            for indices, lr in (kernels, group["lr"]), (others, group["lr"] * group["sgd_lr_ratio"]):
                chosen = [directions[i] for i in indices]
                chosen = _orthogonalize_all(chosen) if indices is kernels else chosen
                _descend([parameters[i] for i in indices], chosen, lr, group["weight_decay"])
        return loss


def _descend(parameters: list[Tensor], directions: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    if not parameters:
        return
    factor: float | Tensor = 1 - lr * weight_decay
    if isinstance(lr, Tensor) and isinstance(factor, Tensor):  # in a CUDA graph, rounded like the floats
        lr, factor = lr.to(directions[0].dtype), factor.to(directions[0].dtype)
    if weight_decay:
        torch._foreach_mul_(parameters, factor)
    torch._foreach_mul_(directions, lr)
    torch._foreach_sub_(parameters, directions)


def _orthogonalize_all(kernels: list[Tensor]) -> list[Tensor]:
    """Orthogonalize kernels of one shape at once, on a GPU all small ones, padded, because launches take the time."""
    groups, results = defaultdict(list), list(kernels)
    for index, kernel in enumerate(kernels):
        is_separate = kernel.device.type == "cpu" or kernel.numel() > MAX_BATCHED_SIZE
        groups[kernel.shape if is_separate else None].append(index)
    for indices in groups.values():
        matrices = [kernels[index].flatten(1) for index in indices]
        matrices = [matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix for matrix in matrices]
        rows, columns = (max(sizes) for sizes in zip(*(matrix.shape for matrix in matrices), strict=True))
        batch = matrices[0].new_zeros(len(matrices), rows, columns)
        for padded, matrix in zip(batch, matrices, strict=True):
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        for padded, matrix, index in zip(orthogonalize(batch), matrices, indices, strict=True):
            shape, result = kernels[index].shape, padded[: matrix.shape[0], : matrix.shape[1]]
            ratio = shape[0] / shape[1:].numel()  # of rows to columns
            results[index] = (result.mT * ratio**0.5 if ratio > 1 else result).reshape(shape)
    return results
