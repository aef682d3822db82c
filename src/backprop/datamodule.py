"""The single training sample of the backprop experiment."""

import lightning as L
import torch
from torch.utils.data import DataLoader, TensorDataset

from src.backprop.network import BackpropModule
from src.core.errors import UserError


class OneSampleDataModule(L.LightningDataModule):
    """Load one batch per epoch: (inputs, targets), both float64 of shape (2,), for BackpropModule alone."""

    name = "one sample"

    def __init__(self, inputs: tuple[float, float], targets: tuple[float, float]) -> None:
        super().__init__()
        self.sample = TensorDataset(*torch.tensor([[inputs], [targets]], dtype=torch.float64))

    def setup(self, stage: str) -> None:
        if not isinstance(self.trainer.lightning_module, BackpropModule):  # type: ignore[union-attr]
            raise UserError("data=backprop has no images; set another data=, or experiment=backprop without model=")

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.sample, batch_size=None)
