"""The network: three blocks of two 3×3 convolutions, a 1×1 convolution, and one linear layer."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, pad

from src.core.value_types import BlurFraction, NonNegativeInt, PositiveInt, Probability


def blur(images: Tensor, share: float) -> Tensor:
    """[N, C, H, W] to the same: along either axis, each pixel gives `share` of itself to both its neighbours."""
    if not share:
        return images
    padded = pad(images, (1, 1, 1, 1), mode="replicate")
    rows = (1 - 2 * share) * padded[:, :, 1:-1] + share * (padded[:, :, :-2] + padded[:, :, 2:])
    return (1 - 2 * share) * rows[..., 1:-1] + share * (rows[..., :-2] + rows[..., 2:])


class AntialiasedMaxPool(nn.Module):
    """The maxima of 2×2 at every place, of which 2×2 are averaged (https://arxiv.org/abs/1904.11486).

    A shift by a pixel changes less of that than of what plain max pooling picks.
    """

    def forward(self, features: Tensor) -> Tensor:
        # Pooling pads the edges before as well, to be cut off; replication, behind alone, is in float32 under autocast.
        return avg_pool2d(max_pool2d(features, 2, 1, padding=1)[..., 1:, 1:], 2)


class CNN(nn.Module):
    """[N, C, H, W] normalised images to [N, classes] log-probabilities; `inputs` is (C, H, W), 8×8 or larger.

    `channels` are the outputs of the six convolutions, in order; another number of them is a ValueError, as are
    images of less than 8×8.
    The defaults have 15,544 parameters. `blur` is the share of a pixel that each neighbour gets before all else; then
    `crop` pixels are cut off at each edge. Of MNIST's 28×28 all but the middle 24×24 is black, but for a few strokes.
    `bn_before_activation` is batch norm before the `activation`, not after. `antialias` smooths the three poolings, or
    each of them apart: the first one, of the largest maps, takes the most time and gives nothing more.
    """

    def __init__(
        self,
        channels: Sequence[PositiveInt] = (16, 16, 16, 16, 16, 32),
        dropout: Probability = 0.25,
        classes: int = 10,
        blur: BlurFraction = 0.0,
        crop: NonNegativeInt = 0,
        activation: Literal["relu", "gelu"] = "relu",
        bn_before_activation: bool = False,
        antialias: bool | Sequence[bool] = False,
        inputs: Sequence[int] = (1, 28, 28),
    ) -> None:
        super().__init__()
        self.blur, self.crop = blur, crop
        if len(channels) != 6:
            raise ValueError(f"model.channels has {len(channels)} numbers; the network has six 3×3 convolutions")
        colours, height, width = inputs[0], inputs[1] - 2 * crop, inputs[2] - 2 * crop
        if min(height, width) < 8:
            raise ValueError(f"model.crop={crop} leaves {max(height, 0)}×{max(width, 0)} pixels; the network needs 8×8")

        def convolution(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
            bend, norm = nn.ReLU() if activation == "relu" else nn.GELU(), nn.BatchNorm2d(outputs)
            return nn.Conv2d(inputs, outputs, 3, padding=1), *((norm, bend) if bn_before_activation else (bend, norm))

        def block(number: int, inputs: int, hidden: int, outputs: int) -> nn.Sequential:
            both = *convolution(inputs, hidden), *convolution(hidden, outputs)
            smooth = antialias if isinstance(antialias, bool) else antialias[number - 1]
            pool = AntialiasedMaxPool() if smooth else nn.MaxPool2d(2)
            return nn.Sequential(*both, pool, nn.Dropout(dropout))

        c1, c2, c3, c4, c5, c6 = channels
        self.conv1 = block(1, colours, c1, c2)  # of MNIST, 28×28 to 14×14
        self.conv2 = block(2, c2, c3, c4)  # to 7×7
        self.conv3 = block(3, c4, c5, c6)  # to 3×3
        self.gap = nn.Conv2d(c6, classes, 1)
        self.fc = nn.Linear(classes * (height // 8) * (width // 8), classes)
        # Convolutions on the CPU are 1.2 to 1.6 times as fast with the channels innermost.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (slice(self.crop, length - self.crop) for length in images.shape[-2:])
        images = blur(images, self.blur)[..., rows, columns]
        features = self.gap(self.conv3(self.conv2(self.conv1(images))))
        return self.fc(features.flatten(1)).log_softmax(dim=1)
