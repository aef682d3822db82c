"""Augmentation of a whole batch at once, on the device that holds it."""

import math
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from src.core.value_types import NonNegativeFloat, Probability, UnitInterval
from src.data.image_spec import make_constants

KNOTS = 5  # along each axis: an elastic displacement runs smoothly through random ones at so many places


class AugmentationSample(NamedTuple):
    """The random numbers for N images, all uniform in ±1."""

    amounts: Tensor  # [N, 6]: rotation, two scales, shear, two shifts
    knots: Tensor | None  # [N, 2, KNOTS, KNOTS]: elastic displacements along x and y, if there are any

    def of(self, index: Tensor) -> "AugmentationSample":
        return AugmentationSample(self.amounts[index], None if self.knots is None else self.knots[index])

    def to(self, device: torch.device) -> "AugmentationSample":
        return AugmentationSample(self.amounts.to(device), None if self.knots is None else self.knots.to(device))


class RandomAffine:
    """Rotates, scales, shears and shifts each image by its own random amounts; what enters is black.

    Each amount is uniform in ± its limit: `degrees` of rotation, `translate` in pixels along each axis,
    `scale` around 1 along each axis, `shear` as the tangent of the angle. torchvision's transform of
    this name draws one set of amounts for the whole batch, hence this one. What is not affine: parts of
    the image are displaced by up to `elastic` pixels along each axis.
    Bilinear interpolation blurs: a network then knows no image as sharp as those it is scored on. Bicubic hardly does.
    Over the last `fade_out` of a run, a fraction of its steps, the limits shrink linearly to 0.
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

    def draw(self, n: int, generator: torch.Generator) -> AugmentationSample:
        def uniform(*shape: int) -> Tensor:
            return torch.empty(shape, device=generator.device).uniform_(-1, 1, generator=generator)

        return AugmentationSample(uniform(6, n).T, uniform(n, 2, KNOTS, KNOTS) if self.elastic else None)

    def __call__(self, images: Tensor, generator: torch.Generator, progress: float | Tensor = 0.0) -> Tensor:
        """[N, C, H, W] floats to the same; `generator` lives on their device; `progress` is the fraction of the run."""
        return self.apply(images, self.draw(len(images), generator), progress)

    def apply(self, images: Tensor, draws: AugmentationSample, progress: float | Tensor) -> Tensor:
        height, width = images.shape[2:]
        left = (1 - progress) / self.fade_out if self.fade_out else 1.0
        strength = left.clamp(max=1.0) if isinstance(left, Tensor) else min(1.0, left)
        shifts = 2 * self.translate / width, 2 * self.translate / height
        limits = make_constants(images.device, math.radians(self.degrees), self.scale, self.scale, self.shear, *shifts)
        limits = limits * strength if self.fade_out else limits
        middle = make_constants(images.device, 0, 1, 1, 0, 0, 0)
        amounts = torch.addcmul(middle[:, None], draws.amounts.T, limits[:, None])
        angle, scale_x, scale_y, shear, shift_x, shift_y = amounts
        cos, sin = angle.cos(), angle.sin()
        # The map from (x, y, 1) of the output to x and y of the input, in which the image spans [-1, 1].
        theta = torch.stack([cos * scale_x, sin + shear, shear * cos - sin, cos * scale_y, shift_x, shift_y], dim=1)
        places = _places(images.device, height, width).expand(len(images), -1, -1)
        grid = (places @ theta.view(-1, 3, 2)).view(-1, height, width, 2)
        if self.elastic:
            assert draws.knots is not None
            bends = interpolate(draws.knots, size=(height, width), mode="bicubic", align_corners=True)
            bends = bends * (2 * self.elastic * strength)
            grid = grid + torch.stack([bends[:, 0] / width, bends[:, 1] / height], dim=3)
        return grid_sample(images, grid, mode=self.interpolation, align_corners=False)


@cache
def _places(device: torch.device, height: int, width: int) -> Tensor:
    """[height · width, 3]: x and y of each pixel, and 1."""
    grid = affine_grid(torch.eye(2, 3)[None], [1, 1, height, width], align_corners=False)
    return torch.cat([grid.view(-1, 2), torch.ones(height * width, 1)], dim=1).to(device)
