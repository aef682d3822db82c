"""How unlike the images of its training a network finds another: after Lee et al. 2018, https://arxiv.org/abs/1807.03888.

A softmax gives a dot or a letter a class with confidence; what the layers make of them lies far from what they make of
any class.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.errors import UserError

SHARE = 0.99  # of the held-out images are within the limit
MOST = 1024  # numbers an image
SHRINKAGE = 0.01  # of the correlations, towards none


def features(net: nn.Module, images: Tensor) -> Tensor:
    """[N, C, H, W] normalised images to [N, F]: mean and deviation, over places, of each channel of each of its parts.

    Where no part gives channels, what its last linear layer is given.
    """
    found: list[Tensor] = []

    def see(_part: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output[0, 0].numel() > 1:
            found.extend((output.mean((2, 3)), output.flatten(2).std(2)))

    last: list[Tensor] = []
    linear = [layer for layer in net.modules() if isinstance(layer, nn.Linear)][-1:]
    with ExitStack() as hooks, torch.inference_mode():
        for part in net.children():
            hooks.callback(part.register_forward_hook(see).remove)
        for layer in linear:
            hooks.callback(layer.register_forward_hook(lambda _, inputs, output: last.append(inputs[0])).remove)
        net(images)
    if not found and not last:
        raise UserError(f"model: {type(net).__name__} has neither channels nor a linear layer to go by")
    return torch.cat(found or last, dim=1)


class Familiar(NamedTuple):
    """Each class's mean [classes, F], the common `precision` [F, F], and the `limit` of their Mahalanobis distance.

    `scale` [F] are the features' deviations, `of` tells for which weights all this was measured.
    """

    means: Tensor
    precision: Tensor
    scale: Tensor
    limit: float
    of: float

    def distances(self, net: nn.Module, images: Tensor) -> Tensor:
        """[N] squared distances to the nearest class of [N, C, H, W] normalised images."""
        apart = (features(net, images) / self.scale)[:, None] - self.means
        return torch.einsum("nci,ij,ncj->nc", apart, self.precision, apart).min(1).values


def fingerprint(net: nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in net.parameters()))


def learn(
    net: nn.Module, known: Iterable[tuple[Tensor, Tensor]], held_out: Iterable[tuple[Tensor, Tensor]]
) -> Familiar:
    """From batches of normalised images with their labels. Raises UserError for a network with too many channels."""
    parts = [(features(net, images), labels) for images, labels in known]
    x, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    if x.shape[1] > MOST:
        raise UserError(f"model: {x.shape[1]:,} numbers an image; at most {MOST:,} are compared")
    scale = x.std(0) + 1e-6
    x = x / scale
    means = torch.stack([x[labels == label].mean(0) for label in range(int(labels.max()) + 1)])
    rest = (x - means[labels]).double()
    precision = torch.linalg.inv(rest.T @ rest / len(rest) + SHRINKAGE * torch.eye(x.shape[1])).float()
    familiar = Familiar(means, precision, scale, 0.0, fingerprint(net))
    distances = torch.cat([familiar.distances(net, images) for images, _ in held_out])
    return familiar._replace(limit=distances.quantile(SHARE).item())
