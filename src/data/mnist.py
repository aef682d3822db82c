"""Handwritten digits as a LightningDataModule that keeps every image in memory, on the training device."""

import warnings
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from src.data.augment import RandomAffine
from src.data.batches import IndexBatches, generator_for, in_memory_loader
from src.data.normalize import normalize
from src.data.reinforce import Reinforcement, View
from src.data.sources import Images, Sets, download_mnist, has_mnist, read_digits, read_mnist
from src.errors import UserError

# What None stands for when the data set is not known beforehand.
BATCH_SIZE = {"mnist": 128, "digits": 32}
VAL_SIZE = {"mnist": 5000, "digits": 150}


class DigitImages(L.LightningDataModule):
    """Batches of ([N, 1, 28, 28] normalised images, [N] labels).

    `dataset` is "mnist", "digits", or "auto": MNIST where it can be had, else digits with a warning.
    `val_size` images are held out of the training images, drawn by `split_seed`, or for None the last ones: a writer's
    images stand together in MNIST, so that those are of other writers, as the test images are. `batch_size` is that
    of one process. None for either size takes what suits the data set. `seed` keys the order and the augmentation.
    With `val_on_test` the test images are scored after every epoch: that draws a curve, and must never choose.
    With `reinforce` the batches for training have a third part, a teacher's answers: [N, classes] log-probabilities;
    `seed` keys the order alone then.
    """

    def __init__(
        self,
        dataset: Literal["mnist", "digits", "auto"],
        root: str,
        seed: int,
        batch_size: int | None = None,
        augment: RandomAffine | None = None,
        reinforce: Reinforcement | None = None,
        val_size: int | None = None,
        val_on_test: bool = False,
        split_seed: int | None = 0,
        eval_batch_size: int = 1000,
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.reinforce = reinforce
        self.view: tuple[int, View] | None = None  # of which epoch
        self.val_size = val_size
        self.val_on_test = val_on_test
        self.split_seed = split_seed
        self.eval_batch_size = eval_batch_size
        self.sets: Sets | None = None

    def prepare_data(self) -> None:
        if self.sets is not None or self.dataset == "digits" or has_mnist(self.root):  # fit has read them, for test
            return
        try:
            download_mnist(self.root)
        except UserError as error:
            if self.dataset == "mnist":
                raise
            warnings.warn(f"training on scikit-learn's small digits: {error}", stacklevel=2)

    def setup(self, stage: str) -> None:
        if self.sets is not None:
            return
        digits = self.dataset == "digits" or (self.dataset == "auto" and not has_mnist(self.root))
        self.name, train, test = read_digits() if digits else read_mnist(self.root)

        val_size = VAL_SIZE[self.name] if self.val_size is None else self.val_size
        if val_size >= len(train.labels):
            raise UserError(
                f"data.val_size={val_size}: {self.name} has {len(train.labels):,} training images; use fewer"
            )
        if self.split_seed is None:
            order = torch.arange(len(train.labels)).flip(0)
        else:
            order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(self.split_seed))
        held_out, kept = order[:val_size], order[val_size:].sort().values

        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")

        def put(images: Images) -> Images:
            return Images(images.images.to(device), images.labels.to(device))

        self.sets = Sets(self.name, put(Images(train.images[kept], train.labels[kept])), put(test))
        self.val = self.sets.test if self.val_on_test else put(Images(train.images[held_out], train.labels[held_out]))

    def _loader(self, images: Images, batch_size: int, seed: int | None = None, *further: Tensor) -> DataLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        device = images.images.device
        batches = IndexBatches(len(images.labels), batch_size, seed, rank, world_size, device)
        return in_memory_loader((*images, *further), batches)

    def train_dataloader(self) -> DataLoader:
        assert self.sets is not None
        train = self.sets.train
        index = [torch.arange(len(train.labels), device=train.labels.device)] if self.reinforce else []
        return self._loader(train, self.batch_size or BATCH_SIZE[self.sets.name], self.seed, *index)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val, self.eval_batch_size) if len(self.val.labels) else []

    def test_dataloader(self) -> DataLoader:
        assert self.sets is not None
        return self._loader(self.sets.test, self.eval_batch_size)

    def on_after_batch_transfer(self, batch: tuple[Tensor, ...], dataloader_idx: int) -> tuple[Tensor, ...]:
        images, labels, *index = batch
        if index:
            assert self.trainer and self.reinforce
            images, answers = self._view_of(self.trainer.current_epoch).batch(images, *index)
            return normalize(images), labels, answers
        if self.augment and self.trainer and self.trainer.training:
            # Keyed by the batch, so that a resumed run draws what the uninterrupted one would have drawn.
            batch_number = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
            keys = self.seed, batch_number, self.trainer.global_rank
            progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
            images = self.augment(images.float(), generator_for(*keys, device=images.device), progress)
        return normalize(images), labels

    def _view_of(self, epoch: int) -> View:
        if self.view is None or self.view[0] != epoch:
            assert self.trainer and self.reinforce and self.sets
            batches = epoch * self.trainer.num_training_batches
            progress = batches / (self.trainer.accumulate_grad_batches * self.trainer.estimated_stepping_batches)
            augment = self.augment or RandomAffine()
            self.view = epoch, self.reinforce.view(self.sets.train.images, augment, epoch, progress)
        return self.view[1]
