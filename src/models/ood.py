"""Detect out-of-distribution (OOD) images: Mahalanobis distance to the nearest class plus energy.

https://arxiv.org/abs/1807.03888, here with one covariance per class, and https://arxiv.org/abs/2010.03759.
"""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from src.core.errors import UserError

THRESHOLD_QUANTILE = 0.9925  # fraction of training images below the threshold; then some 1% of new images are above
FOLDS, MAX_FEATURES = 10, 512


def extract_features(net: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Map [N, C, H, W] normalised images to features [N, F] and energies, -log Σ exp(logits), [N].

    Features are the spatial means of all batch norms, or else convolutions, and the outputs of all linear layers.
    """
    kinds, maps = (nn.BatchNorm2d, nn.Conv2d, nn.Linear), []
    norms, convolutions, linear = ([layer for layer in net.modules() if isinstance(layer, kind)] for kind in kinds)
    with ExitStack() as hooks, torch.inference_mode():
        for layer in (*(norms or convolutions), *linear):
            hooks.enter_context(layer.register_forward_hook(lambda _layer, _inputs, output: maps.append(output)))
        outputs = net(images)
    features = torch.cat([x.flatten(2).mean(2) if x.ndim > 2 else x for x in maps], dim=1)
    return features, -(maps[-1] if linear else outputs).logsumexp(1)


class OODDetector(NamedTuple):
    """A Gaussian of the features per class, and the threshold of the OOD score."""

    means: Tensor  # [classes, F], of features / feature_scale
    whitening: Tensor  # [classes, F, F], inverse Cholesky factors of the covariances
    feature_scale: Tensor  # [F]
    score_mean: Tensor  # [classes + 1], of the squared distances to the own class, and of the energy
    score_std: Tensor  # [classes + 1]
    threshold: float

    def detect(self, net: nn.Module, images: Tensor) -> Tensor:
        """Return whether each of [N, C, H, W] normalised images is out-of-distribution."""
        features, energy = extract_features(net, images)
        distances = compute_distances(features, self.means, self.whitening, self.feature_scale)
        return _compute_score(distances, energy, self.score_mean, self.score_std) > self.threshold


def compute_distances(features: Tensor, means: Tensor, whitening: Tensor, scale: Tensor) -> Tensor:
    """Return the squared Mahalanobis distance of [N, F] features to each class, [N, classes]."""
    return ((features / scale - means[:, None]) @ whitening.float().mT).square().sum(2).T


def _compute_score(distances: Tensor, energy: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    standardised = (torch.cat([distances, energy[:, None]], dim=1) - mean) / std
    return standardised[:, :-1].min(1).values + standardised[:, -1]


def fit_ood_detector(net: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> OODDetector:
    """Fit to batches of normalised images with labels, in the order of the data. Raises UserError."""
    from sklearn.covariance import ledoit_wolf  # predict does not wait for these imports
    from sklearn.model_selection import StratifiedKFold

    parts = [(*extract_features(net, images), labels) for images, labels in batches]
    features, energy, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    counts = labels.bincount()
    if features.shape[1] > MAX_FEATURES or counts.min() < FOLDS:
        numbers = f"{features.shape[1]:,} features, a class has {counts.min()} training images"
        raise UserError(f"{numbers}; an OOD detector needs at most {MAX_FEATURES} and at least {FOLDS}")
    distances = torch.empty(len(features), len(counts))
    # Each fold scores images that it was not fitted to. Folds are contiguous, because neighbours in MNIST share their
    # writer. The last pass fits to all images and scores none.
    for train, test in (*StratifiedKFold(FOLDS).split(features, labels), (slice(None), [])):
        scale = features[train].std(0) + 1e-6
        by_class = [(features[train] / scale)[labels[train] == label] for label in range(len(counts))]
        means = torch.stack([x.mean(0) for x in by_class])
        covariances = torch.stack([torch.from_numpy(ledoit_wolf(x.numpy())[0]) for x in by_class]).double()
        gaussians = means, torch.linalg.inv(torch.linalg.cholesky(covariances)).half(), scale
        distances[test] = compute_distances(features[test], *gaussians)
    scores = [*(distances[labels == label, label] for label in range(len(counts))), energy]
    mean, std = torch.stack([x.mean() for x in scores]), torch.stack([x.std() for x in scores]) + 1e-6
    threshold = _compute_score(distances, energy, mean, std).quantile(THRESHOLD_QUANTILE).item()
    return OODDetector(*gaussians, mean, std, threshold)
