"""A network of depthwise-separable convolutions, for the fewest parameters: a 3×3 kernel a channel, then a 1×1 mix."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from src.core.value_types import PositiveInt


class ChannelBias(nn.Module):
    """What batch norm has beside a scale: through a ReLU, the next convolution's weights do for that.

    A module of its own, because trainer.sync_batchnorm puts another in the place of a batch norm.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.shift


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
    """[N, C, H, W] normalised images to [N, classes] log-probabilities; `inputs` is (C, H, W), 8×8 or larger.

    `stages` are the outputs of the convolutions between two poolings: of a 3×3 one over the image, then of separable
    ones. A depthwise kernel weighs the places of the last map, 3×3 for 28×28. Stages other than three are a ValueError.
    """

    def __init__(
        self, stages: Sequence[Sequence[PositiveInt]], classes: int = 10, inputs: Sequence[int] = (1, 28, 28)
    ) -> None:
        super().__init__()
        if len(stages) != 3:
            raise ValueError(f"model.stages has {len(stages)} lists; the network pools three times")
        first, last = stages[0][0], stages[-1][-1]
        self.stem = nn.Sequential(
            nn.Conv2d(inputs[0], first, 3, padding=1, bias=False),
            nn.BatchNorm2d(first, affine=False),
            ChannelBias(first),
            nn.ReLU(),
        )
        outputs = [channels for stage in stages for channels in stage]
        blocks = iter(_separable(inputs, outputs) for inputs, outputs in pairwise(outputs))
        sizes = len(stages[0]) - 1, len(stages[1]), len(stages[2])
        self.stages = nn.ModuleList(
            nn.Sequential(*(next(blocks) for _ in range(size)), nn.MaxPool2d(2)) for size in sizes
        )
        self.places = nn.Conv2d(last, last, (inputs[1] // 8, inputs[2] // 8), groups=last, bias=False)
        self.fc = nn.Linear(last, classes)
        # Convolutions on the CPU are 1.2 to 1.6 times as fast with the channels innermost.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for stage in self.stages:
            features = stage(features)
        return self.fc(self.places(features).flatten(1)).log_softmax(dim=1)
