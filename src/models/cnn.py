"""The CNN: three blocks of two 3×3 convolutions, a 1×1 convolution and one linear layer."""

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d, normalize, pad

from src.core.value_types import NonNegativeInt, PositiveInt, Probability, UnitInterval


def blur(images: Tensor, fraction: float) -> Tensor:
    """Spread `fraction` of each pixel of [N, C, H, W] to both its neighbours along each axis."""
    if not fraction:
        return images
    padded = pad(images, (1, 1, 1, 1), mode="replicate")
    rows = (1 - 2 * fraction) * padded[:, :, 1:-1] + fraction * (padded[:, :, :-2] + padded[:, :, 2:])
    return (1 - 2 * fraction) * rows[..., 1:-1] + fraction * (rows[..., :-2] + rows[..., 2:])


class AntialiasedMaxPool(nn.Module):
    """Average 2×2 neighbouring maxima of 2×2 pixels, which shifts change less (https://arxiv.org/abs/1904.11486)."""

    def forward(self, features: Tensor) -> Tensor:
        height, width = features.shape[-2:]
        maxima = max_pool2d(features, 2, 1, padding=1)
        return avg_pool2d(maxima[..., height % 2 :, width % 2 :], 2)  # of even maps nothing is cut off: no copy


def make_cosine_filters(count: int) -> Tensor:
    """Return [count, 3, 3] filters: the discrete cosine transform from the lowest frequency on, each in both signs.

    Their factors 2^frequency / 2.5 give maps of MNIST's normalised images a standard deviation of about 1.
    """
    waves = normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, -1.0], [1.0, -2.0, 1.0]]))
    frequencies = sorted(product(range(3), repeat=2), key=sum)
    filters = [2 ** (i + k) / 2.5 * torch.outer(waves[i], waves[k]) for i, k in frequencies]
    return torch.stack(([sign * each for each in filters for sign in (1, -1)] * count)[:count])


class CNN(nn.Module):
    """Map [N, C, H, W] normalised images, 8×8 or larger, to [N, classes] logits.

    The defaults have 15,544 parameters. `channels` are the outputs of the six 3×3 convolutions. `blur` is the fraction
    of each pixel that is spread to each neighbour; then `crop` pixels are cut off at each edge. `antialias` is for all
    three poolings or one value per pooling: the first has the largest maps, takes the most time and helps least.
    `early_pool` moves the first pooling behind the first convolution, which starts from `make_cosine_filters` if
    `cosine_filters`. `input_shape` is (C, H, W).
    """

    def __init__(
        self,
        channels: Sequence[PositiveInt] = (16, 16, 16, 16, 16, 32),
        dropout: Probability = 0.25,
        num_classes: int = 10,
        blur: UnitInterval = 0.0,
        crop: NonNegativeInt = 0,
        activation: Literal["relu", "gelu", "silu"] = "relu",
        bn_before_activation: bool = False,
        antialias: bool | Sequence[bool] = False,
        early_pool: bool = False,
        cosine_filters: bool = False,
        input_shape: Sequence[int] = (1, 28, 28),
    ) -> None:
        super().__init__()
        self.blur, self.crop = blur, crop
        height, width = input_shape[1] - 2 * crop, input_shape[2] - 2 * crop
        antialias = [antialias] * 3 if isinstance(antialias, bool) else antialias

        def convolution(inputs: int, outputs: int) -> list[nn.Module]:
            layers = [{"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}[activation](), nn.BatchNorm2d(outputs)]
            return [nn.Conv2d(inputs, outputs, 3, padding=1), *(layers[::-1] if bn_before_activation else layers)]

        def block(inputs: int, hidden: int, outputs: int, antialias: bool, early_pool: bool = False) -> nn.Sequential:
            layers = [*convolution(inputs, hidden), *convolution(hidden, outputs), nn.Dropout(dropout)]
            layers.insert(1 if early_pool else 6, AntialiasedMaxPool() if antialias else nn.MaxPool2d(2))
            return nn.Sequential(*layers)

        c1, c2, c3, c4, c5, c6 = channels
        self.conv1 = block(input_shape[0], c1, c2, antialias[0], early_pool)  # 28×28 to 14×14 for MNIST
        if cosine_filters:
            first: Any = self.conv1[0]
            first.weight.data.copy_(make_cosine_filters(c1)[:, None] / input_shape[0])
            first.bias.data.zero_()
        self.conv2 = block(c2, c3, c4, antialias[1])  # to 7×7
        self.conv3 = block(c4, c5, c6, antialias[2])  # to 3×3
        self.gap = nn.Conv2d(c6, num_classes, 1)
        self.fc = nn.Linear(num_classes * (height // 8) * (width // 8), num_classes)
        # Convolutions on a CPU are 1.2 to 1.6 times as fast in this memory layout, which mps computes wrongly before
        # PyTorch 2.15 (pytorch#192212).
        if not torch.backends.mps.is_available():
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (slice(self.crop, length - self.crop) for length in images.shape[-2:])
        images = blur(images, self.blur)[..., rows, columns]
        features = self.gap(self.conv3(self.conv2(self.conv1(images))))
        return self.fc(features.flatten(1))
