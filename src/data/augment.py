"""Augment a whole batch at once, on its own device."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from src.core.value_types import NonNegativeFloat, Probability, UnitInterval

KNOTS = 5  # per axis: an elastic displacement interpolates random displacements at these points


class RandomAffine:
    """Rotate, scale, shear, shift and distort each image by its own random amounts, uniform in ± the limits.

    torchvision's transform of this name draws one set of amounts per batch. `translate` and `elastic`, an elastic
    displacement, are in pixels; `scale` is a fraction and `shear` the tangent of an angle. Bicubic interpolation keeps
    images sharper. Over the last `fade_out`, a fraction of the run, the limits shrink linearly to 0.
    """

    def __init__(
        self,
        degrees: NonNegativeFloat = 0.0,
        translate: NonNegativeFloat = 0.0,
        scale: Probability = 0.0,
        shear: NonNegativeFloat = 0.0,
        elastic: NonNegativeFloat = 0.0,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        fade_out: UnitInterval = 0.0,
    ) -> None:
        self.degrees, self.translate, self.scale, self.shear, self.fade_out = degrees, translate, scale, shear, fade_out
        self.elastic, self.interpolation = elastic, interpolation

    def draw(self, n: int, generator: torch.Generator) -> list[Tensor]:
        """Draw numbers in ±1 for n images: [n, 6] affine amounts; if elastic, [n, 2, KNOTS, KNOTS] displacements."""
        shapes = [(6, n), (n, 2, KNOTS, KNOTS)][: 2 if self.elastic else 1]
        sample = [torch.empty(shape, device=generator.device).uniform_(-1, 1, generator=generator) for shape in shapes]
        return [sample[0].T, *sample[1:]]

    def __call__(self, images: Tensor, generator: torch.Generator, progress: float | Tensor = 0.0) -> Tensor:
        return self.apply(images, self.draw(len(images), generator), progress)

    def apply(self, images: Tensor, sample: Sequence[Tensor], progress: float | Tensor) -> Tensor:
        """Augment [N, C, H, W] float images; `progress` is the fraction of the run that is done."""
        height, width = images.shape[2:]
        remaining = (1 - progress) / self.fade_out if self.fade_out else 1.0
        strength = remaining.clamp(max=1.0) if isinstance(remaining, Tensor) else min(1.0, remaining)
        shifts = 2 * self.translate / width, 2 * self.translate / height
        limits = _make_constants(images.device, math.radians(self.degrees), self.scale, self.scale, self.shear, *shifts)
        limits = limits * strength if self.fade_out else limits
        identity = _make_constants(images.device, 0, 1, 1, 0, 0, 0)
        amounts = torch.addcmul(identity[:, None], sample[0].T, limits[:, None])
        angle, scale_x, scale_y, shear, shift_x, shift_y = amounts
        cos, sin = angle.cos(), angle.sin()
        # Maps (x, y, 1) of an output pixel to x and y of the input; the image spans [-1, 1].
        theta = torch.stack([cos * scale_x, shear * cos - sin, shift_x, sin + shear, cos * scale_y, shift_y], dim=1)
        grid = affine_grid(theta.view(-1, 2, 3), list(images.shape), align_corners=False)
        if self.elastic:
            displacements = interpolate(sample[1], size=(height, width), mode="bicubic", align_corners=True)
            displacements = displacements * (2 * self.elastic * strength)
            grid = grid + torch.stack([displacements[:, 0] / width, displacements[:, 1] / height], dim=3)
        return grid_sample(images, grid, mode=self.interpolation, align_corners=False)


@cache  # copying them in every step would wait for a GPU
def _make_constants(device: torch.device, *numbers: float) -> Tensor:
    return torch.tensor(numbers, device=device, dtype=torch.float32)
