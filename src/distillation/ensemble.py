"""Several trained networks as one, to learn from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr
from src.models.classifier import move_to_device
from src.training.predictor import load_predictor


class Ensemble(nn.Module):
    """[N, 1, 28, 28] normalised images to the mean of what the networks in `files` give for them, [N, classes].

    That mean of log-probabilities lacks the constant that would make them sum to one; a softmax adds it.
    `files` are what src.training.predictor loads. `digest` tells two ensembles apart by the contents of their files.
    """

    def __init__(self, files: Sequence[NonEmptyStr]) -> None:
        super().__init__()
        if not files:
            raise UserError("data.soft_labels.teacher.files is empty; name run folders or .pt files")
        trained = [load_predictor(Path(file)) for file in files]
        self.nets = trained
        self.parts = nn.ModuleList(trained)
        self.digest = hashlib.sha256(b"".join(each.file.read_bytes() for each in trained)).hexdigest()

    def to(self, device: torch.device) -> "Ensemble":  # type: ignore[override]
        move_to_device(self.parts, device)
        return self

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([net.log_probabilities(images) for net in self.nets]).mean(dim=0)
