"""How unlike the images of its training a network finds another.

A softmax gives a dot or a letter a class with confidence; what the layers make of them lies far from what they make of
any class, and what the last layer sums up stays small. Mahalanobis distances: Lee et al. 2018,
https://arxiv.org/abs/1807.03888, here with a covariance a class; energy: Liu et al. 2020,
https://arxiv.org/abs/2010.03759.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.core.errors import UserError

# Of the known images are within the limit. One in a hundred of new ones may be doubted; of ten thousand, chance alone
# makes that 0.09 points more or less.
SHARE = 0.9925
FOLDS = 10
MOST = 512  # numbers an image


def extract_features(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """[N, C, H, W] normalised images to [N, F] and to the energy [N].

    The numbers are the mean over places of each channel of its batch norms, or without those of its convolutions, and
    what its linear layers give. The energy is -log Σ exp of the last of these, or of the network's own outputs.
    """
    norms, convolutions, linear = (
        [layer for layer in net.modules() if isinstance(layer, kind)] for kind in (nn.BatchNorm2d, nn.Conv2d, nn.Linear)
    )
    found: list[Tensor] = []

    def see(_layer: nn.Module, _inputs: Any, output: Tensor) -> None:
        found.append(output.flatten(2).mean(2) if output.ndim > 2 else output)

    with ExitStack() as hooks, torch.inference_mode():
        for layer in (*(norms or convolutions), *linear):
            hooks.callback(layer.register_forward_hook(see).remove)
        outputs = net(images)
    if not found:
        raise UserError(f"model: {type(net).__name__} has neither channels nor a linear layer to go by")
    return torch.cat(found, dim=1), -(found[-1] if linear else outputs).logsumexp(1)


class OODDetector(NamedTuple):
    """What a network makes of each class, and the `limit` of how unlike that an image may be.

    `means` [classes, F] and `whiten` [classes, F, F], the inverse Cholesky factors of the covariances, are those of
    features over their deviations, `scale` [F]. `centre` and `spread` [classes + 1] are the mean and the deviation of
    the squared distances to the own class, and of the energy. `of` tells for which weights all this was measured.
    """

    means: Tensor
    whiten: Tensor
    scale: Tensor
    centre: Tensor
    spread: Tensor
    limit: float
    of: float

    def distances(self, net: nn.Module, images: Tensor) -> Tensor:
        """[N] from [N, C, H, W] normalised images: in deviations, the nearest class's distance and the energy added."""
        x, energy = extract_features(net, images)
        return self.unlike(self.squared(x), energy)

    def unlike(self, squared: Tensor, energy: Tensor) -> Tensor:
        apart = (torch.cat([squared, energy[:, None]], dim=1) - self.centre) / self.spread
        return apart[:, :-1].min(1).values + apart[:, -1]

    def squared(self, x: Tensor) -> Tensor:
        """[N, classes] squared Mahalanobis distances of [N, F]."""
        return torch.stack(
            [
                ((x / self.scale - mean) @ whiten.float().T).square().sum(1)
                for mean, whiten in zip(self.means, self.whiten, strict=True)
            ],
            dim=1,
        )


def compute_fingerprint(net: nn.Module) -> float:
    return float(sum(parameter.detach().double().abs().sum() for parameter in net.parameters()))


def fit_ood_detector(net: nn.Module, known: Iterable[tuple[Tensor, Tensor]]) -> OODDetector:
    """From batches of normalised images with their labels, in the order of the data.

    The limit is that of images left out of what they are compared with: one in ten of each class at a time, neighbours,
    as in MNIST the images of a writer are. Raises UserError for a network of too many channels, and for a class with
    fewer than ten images.
    """
    from sklearn.model_selection import StratifiedKFold  # here, as in _gaussians, because predict can do without

    parts = [(*extract_features(net, images), labels) for images, labels in known]
    x, energy, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    if x.shape[1] > MOST:
        raise UserError(f"model: {x.shape[1]:,} numbers an image; at most {MOST} are compared")
    if (fewest := int(torch.bincount(labels).min())) < FOLDS:
        raise UserError(f"data: a class has {fewest} images to train on; at least {FOLDS} are needed")
    classes = int(labels.max()) + 1
    squared = torch.empty(len(x), classes)
    for kept, left_out in StratifiedKFold(FOLDS).split(x, labels):
        squared[left_out] = _gaussians(x[kept], labels[kept], classes).squared(x[left_out])
    own = [squared[labels == label, label] for label in range(classes)]
    centre, spread = (torch.stack([moment(each) for each in (*own, energy)]) for moment in (torch.mean, torch.std))
    familiar = _gaussians(x, labels, classes)._replace(centre=centre, spread=spread + 1e-6, of=compute_fingerprint(net))
    return familiar._replace(limit=familiar.unlike(squared, energy).quantile(SHARE).item())


def _gaussians(x: Tensor, labels: Tensor, classes: int) -> OODDetector:
    """Shrunk as Ledoit and Wolf have it (2004): the more, the fewer images a class has."""
    from sklearn.covariance import LedoitWolf

    scale = x.std(0) + 1e-6
    fits = [LedoitWolf(store_precision=False).fit((x / scale)[labels == label].numpy()) for label in range(classes)]
    means = torch.stack([torch.from_numpy(fit.location_) for fit in fits]).float()
    covariances = torch.stack([torch.from_numpy(fit.covariance_) for fit in fits]).double()
    whiten = torch.linalg.inv(torch.linalg.cholesky(covariances)).half()  # a byte more or less shows nowhere
    return OODDetector(means, whiten, scale, torch.zeros(0), torch.zeros(0), 0.0, 0.0)
