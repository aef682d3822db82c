"""Several trained networks as one, to learn from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from src.errors import UserError
from src.models.classifier import on_device
from src.runs.weights import load
from src.values import Text


class Ensemble(nn.Module):
    """[N, 1, 28, 28] normalised images to the mean of what the networks in `files` give for them, [N, classes].

    That mean of log-probabilities lacks the constant that would make them sum to one; a softmax adds it.
    `files` are what src.runs.weights loads. `digest` tells two ensembles apart by the contents of their files.
    """

    def __init__(self, files: Sequence[Text]) -> None:
        super().__init__()
        if not files:
            raise UserError("data.reinforce.teacher.files is empty; name run folders or .pt files")
        trained = [load(Path(file)) for file in files]
        self.nets = trained
        self.parts = nn.ModuleList(trained)
        self.digest = hashlib.sha256(b"".join(each.file.read_bytes() for each in trained)).hexdigest()

    def to(self, device: torch.device) -> "Ensemble":  # type: ignore[override]
        on_device(self.parts, device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([net.log_probabilities(images) for net in self.nets]).mean(dim=0)
