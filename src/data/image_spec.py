"""What a network has to know of the images it is trained on."""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from src.core.errors import UserError

MAX_NUMBERS = 150_000_000  # of an image: 50 million pixels in colour
MNIST_MEAN, MNIST_STD = 0.1307, 0.3081  # of its training pixels, as fractions of white


@cache
def make_constants(device: torch.device, *numbers: float) -> Tensor:
    """Kept on the device: to bring them there in every step would be to wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device, dtype=torch.float32)


class ImageSpec(NamedTuple):
    """`shape` is (channels, height, width), `mean` and `std` are fractions of white, one a channel.

    `preprocess` says how a picture from elsewhere becomes such an image: as a "digit" in MNIST's form, or by "resize".
    """

    name: str
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    preprocess: Literal["mnist", "resize"]

    @classmethod
    def of(cls, plain: Any) -> "ImageSpec":
        """From what `plain` gave. Raises UserError for anything else."""
        try:
            name, preprocess = plain["name"], plain["preprocess"]
            shape = tuple(int(n) for n in plain["shape"])
            classes = tuple(str(name) for name in plain["classes"])
            mean, std = (tuple(float(x) for x in plain[key]) for key in ("mean", "std"))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"what it says of its images is damaged ({error})") from error
        spec = cls(name, shape, classes, mean, std, preprocess)  # type: ignore[arg-type]
        drawable = len(shape) == 3 and min(shape) > 0 and math.prod(shape) <= MAX_NUMBERS
        scaled = drawable and len(mean) == len(std) == shape[0] and min(std) > 0
        if not scaled or not all(map(math.isfinite, mean + std)) or len(classes) < 2:
            raise UserError(f"what it says of its images is damaged ({spec})")
        return spec

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}

    @property
    def noun(self) -> str:
        return "digit" if self.preprocess == "mnist" else "class"

    def _scale(self, values: Sequence[float], like: Tensor) -> Any:
        levels = [255 * value for value in values]
        return levels[0] if len(levels) == 1 else make_constants(like.device, *levels).view(-1, 1, 1)

    def normalize(self, images: Tensor) -> Tensor:
        """[..., C, H, W] pixels in 0 … 255 to floats with the mean taken off, in units of the standard deviation."""
        return (images.float() - self._scale(self.mean, images)) / self._scale(self.std, images)

    def pixels(self, normalized: Tensor) -> Tensor:
        """What `normalize` was given, as uint8."""
        levels = normalized * self._scale(self.std, normalized) + self._scale(self.mean, normalized)
        return levels.round().clamp(0, 255).byte()


MNIST_SPEC = ImageSpec("mnist", (1, 28, 28), tuple("0123456789"), (MNIST_MEAN,), (MNIST_STD,), "mnist")
