"""Describe the images that a network is trained on."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor


class ImageSpec(NamedTuple):
    """Shape, classes and normalisation of a data set, saved in each checkpoint.

    `shape` is (channels, height, width); `mean` and `std` are fractions of white, one per channel. `preprocess` says
    how other images are converted: to MNIST's format ("mnist"), or by resizing ("resize").
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocess: Literal["mnist", "resize"]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageSpec":
        """Build the spec from what `_asdict` returned, also with lists for tuples."""
        fields: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**fields)

    @property
    def label_name(self) -> str:
        """Return "digit" or "class"."""
        return "digit" if self.preprocess == "mnist" else "class"

    def normalize(self, images: Tensor) -> Tensor:
        """Convert [..., C, H, W] pixels in 0 … 255 to floats of mean 0 and standard deviation 1."""
        # By channels: a tensor of the means would have to be copied to a GPU in every step.
        moments = zip(images.float().unbind(-3), self.mean, self.std, strict=True)
        return torch.stack([(channel - 255 * mean) / (255 * std) for channel, mean, std in moments], dim=-3)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Convert normalised images back to uint8 pixels."""
        moments = zip(normalized.unbind(-3), self.mean, self.std, strict=True)
        levels = [channel * (255 * std) + 255 * mean for channel, mean, std in moments]
        return torch.stack(levels, dim=-3).round().clamp(0, 255).byte()
