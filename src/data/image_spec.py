"""Describe the images that a network is trained on."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from src.core.errors import UserError

MAX_NUMBERS = 150_000_000  # per image: 50 million pixels in colour


def make_constants(device: torch.device, *numbers: float) -> Tensor:
    """Return the numbers as float32 on the device, cached, because copying them in every step would wait for a GPU."""
    if torch.compiler.is_compiling():  # an export traces with tensors that must not outlive it
        return torch.tensor(numbers, device=device, dtype=torch.float32)
    return _cache_constants(device, *numbers)


@cache
def _cache_constants(device: torch.device, *numbers: float) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device, dtype=torch.float32)


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
    def from_dict(cls, values: Any) -> "ImageSpec":
        """Build the spec from what `to_dict` returned. Raises UserError for anything else, and for too large images."""
        try:
            mean, std = (tuple(map(float, values[key])) for key in ("mean", "std"))
            shape, classes = tuple(map(int, values["shape"])), tuple(map(str, values["classes"]))
            if len(shape) != 3 or not 0 < math.prod(shape) <= MAX_NUMBERS or not all(0 < x < math.inf for x in std):
                raise ValueError(values)
            return cls(values["name"], shape, classes, mean, std, values["preprocess"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the description of its images is damaged ({error})") from error

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self._asdict().items()}

    @property
    def label_name(self) -> str:
        """Return "digit" or "class"."""
        return "digit" if self.preprocess == "mnist" else "class"

    def _scale(self, values: Sequence[float], like: Tensor) -> Any:
        levels = [255 * value for value in values]
        return levels[0] if len(levels) == 1 else make_constants(like.device, *levels).view(-1, 1, 1)

    def normalize(self, images: Tensor) -> Tensor:
        """Convert [..., C, H, W] pixels in 0 … 255 to floats of mean 0 and standard deviation 1."""
        return (images.float() - self._scale(self.mean, images)) / self._scale(self.std, images)

    def denormalize(self, normalized: Tensor) -> Tensor:
        """Convert normalised images back to uint8 pixels."""
        levels = normalized * self._scale(self.std, normalized) + self._scale(self.mean, normalized)
        return levels.round().clamp(0, 255).byte()
