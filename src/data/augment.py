"""Augmentation of a whole batch at once, on the device that holds it."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from src.values import Fraction, NotNegative, Share

KNOTS = 5  # along each axis: an elastic displacement runs smoothly through random ones at so many places


class Draws(NamedTuple):
    """The random numbers for N images, all uniform in ±1."""

    amounts: Tensor  # [N, 6]: rotation, two scales, shear, two shifts
    knots: Tensor  # [N, 2, KNOTS, KNOTS]: elastic displacements along x and y

    def of(self, index: Tensor) -> "Draws":
        return Draws(self.amounts[index], self.knots[index])


class RandomAffine:
    """Rotates, scales, shears and shifts each image by its own random amounts; what enters is black.

    Each amount is uniform in ± its limit: `degrees` of rotation, `translate` in pixels along each axis,
    `scale` around 1 along each axis, `shear` as the tangent of the angle. torchvision's transform of
    this name draws one set of amounts for the whole batch, hence this one. What is not affine: parts of
    the image are displaced by up to `elastic` pixels along each axis.
    Bilinear interpolation blurs: a network then knows no image as sharp as those it is scored on. Bicubic hardly does.
    Over the last `decay` of a run, a fraction of its steps, the limits shrink linearly to 0.
    """

    def __init__(
        self,
        degrees: NotNegative = 0.0,
        translate: NotNegative = 0.0,
        scale: Share = 0.0,
        shear: NotNegative = 0.0,
        elastic: NotNegative = 0.0,
        interpolation: Literal["bilinear", "bicubic"] = "bilinear",
        decay: Fraction = 0.0,
    ) -> None:
        self.degrees, self.translate, self.scale, self.shear, self.decay = degrees, translate, scale, shear, decay
        self.elastic, self.interpolation = elastic, interpolation

    def draw(self, n: int, generator: torch.Generator) -> Draws:
        amounts = torch.rand(6, n, generator=generator, device=generator.device).T
        knots = torch.rand(n, 2, KNOTS, KNOTS, generator=generator, device=generator.device)
        return Draws(amounts * 2 - 1, knots * 2 - 1)

    def __call__(self, images: Tensor, generator: torch.Generator, progress: float = 0.0) -> Tensor:
        """[N, C, H, W] floats to the same; `generator` lives on their device; `progress` is the fraction of the run."""
        return self.apply(images, self.draw(len(images), generator), progress)

    def apply(self, images: Tensor, draws: Draws, progress: float) -> Tensor:
        height, width = images.shape[2:]
        strength = min(1.0, (1 - progress) / self.decay) if self.decay else 1.0
        amounts = draws.amounts.T * strength
        angle = amounts[0] * math.radians(self.degrees)
        scale_x, scale_y = 1 + amounts[1] * self.scale, 1 + amounts[2] * self.scale
        shear = amounts[3] * self.shear
        cos, sin = angle.cos(), angle.sin()
        # Rows of the map from output to input coordinates, in which the image spans [-1, 1].
        theta = torch.stack(
            [
                torch.stack([cos * scale_x, shear * cos - sin, amounts[4] * (2 * self.translate / width)], 1),
                torch.stack([sin + shear, cos * scale_y, amounts[5] * (2 * self.translate / height)], 1),
            ],
            1,
        )
        grid = affine_grid(theta, list(images.shape), align_corners=False)
        if self.elastic:
            shifts = interpolate(draws.knots, size=(height, width), mode="bicubic", align_corners=True)
            shifts = shifts * (2 * self.elastic * strength)
            grid = grid + torch.stack([shifts[:, 0] / width, shifts[:, 1] / height], dim=3)
        return grid_sample(images, grid, mode=self.interpolation, align_corners=False)
