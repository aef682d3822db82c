"""Several trained networks as one, to learn from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from src.weights import load


class Ensemble(nn.Module):
    """[N, 1, 28, 28] normalised images to the mean of what the networks in `files` give for them, [N, classes].

    That mean of log-probabilities lacks the constant that would make them sum to one; a softmax adds it.
    `files` are what src.weights loads. `digest` tells two ensembles apart by the contents of their files.
    """

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__()
        trained = [load(Path(file)) for file in files]
        self.nets = nn.ModuleList(each.net for each in trained)
        self.digest = hashlib.sha256(b"".join(each.file.read_bytes() for each in trained)).hexdigest()

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([net(images) for net in self.nets]).mean(dim=0)
