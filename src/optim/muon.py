"""Muon for convolutions; torch.optim.Muon takes only matrices."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer

from src.core.value_types import NonNegativeFloat, PositiveFloat, Probability

MAX_BATCHED_SIZE = 2**16  # numbers per kernel: above, arithmetic takes longer than launching it


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return about the nearest [N, rows, columns] matrices with singular values of 0.7 to 1.2; zeros stay zeros.

    Newton-Schulz iteration (https://kellerjordan.github.io/posts/muon/), faster with fewer rows than columns.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


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
                self.state[parameter] = self.state[parameter] or {"momentum_buffer": torch.zeros_like(parameter)}
            gradients = [parameter.grad for parameter in parameters]
            buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            directions = torch._foreach_add(gradients, buffers, alpha=group["momentum"])
            for is_kernel, factor in (True, 1.0), (False, group["sgd_lr_ratio"]):
                indices = [i for i, x in enumerate(parameters) if (x.ndim == 4 and x.shape[1] > 1) == is_kernel]
                if not indices:
                    continue
                chosen, updates = [parameters[i] for i in indices], [directions[i] for i in indices]
                lr = group["lr"] * factor
                decay = 1 - lr * group["weight_decay"]
                if isinstance(lr, Tensor):  # in a CUDA graph, rounded like the floats
                    lr, decay = lr.to(updates[0].dtype), decay.to(updates[0].dtype)
                if group["weight_decay"]:
                    torch._foreach_mul_(chosen, decay)
                updates = _orthogonalize_all(updates) if is_kernel else updates
                torch._foreach_mul_(updates, lr)
                torch._foreach_sub_(chosen, updates)
        return loss


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
        batch = torch.stack([pad(x, (0, columns - x.shape[1], 0, rows - x.shape[0])) for x in matrices])
        for result, matrix, index in zip(orthogonalize(batch), matrices, indices, strict=True):
            shape, result = kernels[index].shape, result[: matrix.shape[0], : matrix.shape[1]]
            ratio = shape[0] / shape[1:].numel()  # of rows to columns
            results[index] = (result.mT * ratio**0.5 if ratio > 1 else result).reshape(shape)
    return results
