"""The scale on which the network sees pixels; apart from the data modules, so that predicting loads little."""

from torch import Tensor

MEAN, STD = 0.1307, 0.3081  # of MNIST's training pixels, as fractions of white


def normalize(images: Tensor) -> Tensor:
    """Pixels in 0 … 255 to floats with MNIST's mean taken off, in units of its standard deviation."""
    return (images.float() - 255 * MEAN) / (255 * STD)


def pixels(normalized: Tensor) -> Tensor:
    """What `normalize` was given, as uint8."""
    return (normalized * (255 * STD) + 255 * MEAN).round().clamp(0, 255).byte()
