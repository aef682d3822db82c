"""A CNN of depthwise-separable convolutions, a 3×3 kernel per channel and then a 1×1 mix, for the fewest parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from src.core.value_types import PositiveInt


class ChannelBias(nn.Module):
    """Add a bias per channel, instead of batch norm's scale and bias: the next weights can scale through the ReLU."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.bias


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs, affine=False),
        ChannelBias(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.ReLU(),
        nn.BatchNorm2d(outputs, affine=False),
    )


class SeparableCNN(nn.Module):
    """Map [N, C, H, W] normalised images, 8×8 or larger, to [N, classes] logits.

    `stages` are the output channels of the convolutions before each of three poolings; the first convolution is a plain
    3×3. A depthwise kernel weighs the positions of the last map. `input_shape` is (C, H, W).
    """

    def __init__(
        self, stages: Sequence[Sequence[PositiveInt]], num_classes: int = 10, input_shape: Sequence[int] = (1, 28, 28)
    ) -> None:
        super().__init__()
        first, last = stages[0][0], stages[-1][-1]
        stem = nn.Conv2d(input_shape[0], first, 3, padding=1, bias=False), nn.BatchNorm2d(first, affine=False)
        self.stem = nn.Sequential(*stem, ChannelBias(first), nn.ReLU())
        self.stages, widths = nn.ModuleList(), [first]
        for outputs in stages[0][1:], *stages[1:]:
            widths = [widths[-1], *outputs]
            self.stages.append(nn.Sequential(*map(_separable, widths, outputs), nn.MaxPool2d(2)))
        _, height, width = input_shape
        self.spatial_weights = nn.Conv2d(last, last, (height // 8, width // 8), groups=last, bias=False)
        self.fc = nn.Linear(last, num_classes)
        if not torch.backends.mps.is_available():  # as in cnn.py, which says why
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        return self.fc(self.spatial_weights(features).flatten(1))
