"""The single training sample of the backprop experiment."""

from collections.abc import Sequence

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from src.backprop.network import BackpropModule
from src.core.errors import UserError, parse_finite_numbers


class OneSampleDataModule(L.LightningDataModule):
    """Load one batch per epoch: (inputs, targets), both float64 of shape (2,), for BackpropModule alone."""

    name = "one sample"

    def __init__(self, inputs: Sequence[float], targets: Sequence[float]) -> None:
        super().__init__()
        i = parse_finite_numbers("data.inputs", inputs, ("i1", "i2"))
        t = parse_finite_numbers("data.targets", targets, ("t1", "t2"))
        self.sample = TensorDataset(*torch.tensor([[i], [t]], dtype=torch.float64))

    def setup(self, stage: str) -> None:
        if not isinstance(self.trainer.lightning_module, BackpropModule):  # type: ignore[union-attr]
            raise UserError("data=backprop has no images; set another data=, or experiment=backprop without model=")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sample, batch_size=None)
