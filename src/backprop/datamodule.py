"""The single training sample of the backprop experiment."""

from collections.abc import Sequence

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from src.backprop.network import BackpropModule
from src.core.errors import UserError, parse_finite_numbers


class OneSampleDataModule(L.LightningDataModule):
    """Load one batch per epoch: the pair (inputs, targets), both float64 of shape (2,).

    Raises UserError unless both are two finite numbers, and if another task than BackpropModule trains on it.
    """

    name = "one sample"

    def __init__(self, inputs: Sequence[float], targets: Sequence[float]) -> None:
        super().__init__()
        numbers = (
            parse_finite_numbers("data.inputs", inputs, ("i1", "i2")),
            parse_finite_numbers("data.targets", targets, ("t1", "t2")),
        )
        self.sample = TensorDataset(*(torch.tensor([pair], dtype=torch.float64) for pair in numbers))

    def setup(self, stage: str) -> None:
        if not isinstance(self.trainer.lightning_module, BackpropModule):  # type: ignore[union-attr]
            raise UserError("data=backprop: has no images; type another data=, or experiment=backprop without model=")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sample, batch_size=None)
