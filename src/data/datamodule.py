"""Labelled images as a LightningDataModule: in memory on the training device, or read by worker processes."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt, Seed, UnitInterval
from src.data.augment import RandomAffine
from src.data.datasets import DatasetSplits, LabeledImages, stratify
from src.data.image_spec import ImageSpec
from src.data.sampler import IndexBatchSampler, hash_seed

STATISTICS_SAMPLE = 2000  # images that mean and standard deviation are measured on if worker processes read them
WORKER_TIMEOUT = 300  # seconds that a worker process may take for a batch


class Batch(NamedTuple):
    """The input of a step. It iterates over what is not None: `images, labels = batch` works without soft labels."""

    images: Tensor  # [N, C, H, W], normalised
    labels: Tensor  # [N]
    teacher_log_probs: Tensor | None = None  # [N, classes]

    def __iter__(self) -> Iterator[Tensor]:
        return (part for part in (self.images, self.labels, self.teacher_log_probs) if part is not None)


class ImageDataModule(L.LightningDataModule):
    """Serve the images of a class of src.data.datasets, normalised and, for training, augmented.

    `val_size` training images are held out: stratified, at random, or the last ones, which in MNIST are of other
    writers. `val_size` None means the data set's own validation images, if it has any. With `folds`, those of `fold`
    are held out instead. A smaller `train_size` trains on a subset of a larger one. `seed` keys order and augmentation;
    `soft_labels`, of src.distillation, has its own. conf/data/images.yaml has units and defaults.
    """

    def __init__(
        self,
        dataset: Any,
        root: NonEmptyStr = "data",
        seed: Seed = 0,
        batch_size: PositiveInt | None = None,
        augment: RandomAffine | None = None,
        soft_labels: Any = None,
        val_size: NonNegativeInt | None = None,
        train_size: PositiveInt | None = None,
        test_every_epoch: bool = False,
        val_split: Literal["stratified", "random", "last"] = "random",
        split_seed: Seed = 0,
        sampler: Literal["shuffle", "weighted"] = "shuffle",
        folds: PositiveInt | None = None,
        fold: NonNegativeInt = 0,
        eval_batch_size: PositiveInt = 1000,
        num_workers: PositiveInt | None = None,
        preprocess: Literal["mnist", "resize"] = "resize",
        mean: Sequence[UnitInterval] | None = None,
        std: Sequence[PositiveFloat] | None = None,
    ) -> None:
        super().__init__()
        if folds and not max(2, fold + 1) <= folds:
            raise UserError(f"data.folds={folds}: must be 2 or more, and above data.fold={fold}")
        self.dataset, self.root, self.seed = dataset, Path(root).expanduser(), seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.augment, self.soft_labels = augment, soft_labels
        self.val_size, self.train_size, self.test_every_epoch = val_size, train_size, test_every_epoch
        self.val_split, self.split_seed, self.folds, self.fold = val_split, split_seed, folds, fold
        self.preprocess, self.mean, self.std, self.sampler = preprocess, mean, std, sampler
        self.device = torch.device("cpu")
        self.progress: float | Tensor = 0.0  # fraction of the run that is done; a tensor if a CUDA graph reads it

    def prepare_data(self) -> None:
        if "splits" not in vars(self):  # Lightning prepares for the test again
            self.dataset.download(self.root)

    def setup(self, stage: str | None = None) -> None:
        self.device = self.trainer.strategy.root_device if self.trainer else self.device
        self.generator = torch.Generator(self.device)
        if not self.num_workers:
            moved = [LabeledImages(*(x.to(self.device) for x in split[:])) for split in self.splits[2:]]  # type: ignore[arg-type, index]
            self.splits = DatasetSplits(*self.splits[:2], *moved)

    @cached_property
    def splits(self) -> DatasetSplits:
        """Load the images and hold the validation images out of the training images."""
        name, classes, train, test, val = self.dataset.load(self.root)
        if not self.num_workers:
            train, test, val = (split and LabeledImages(*split[:]) for split in (train, test, val))
        order = self._order(train.labels)
        if self.folds:
            parts = list(order.tensor_split(self.folds))
            held_out, order = parts.pop(self.fold), torch.cat([*parts, order[:0]])
        else:
            default = 0 if val else min(max(1, len(order) // 10), 5000)
            held_out, order = order.tensor_split([default if self.val_size is None else self.val_size])
        if len(order) < (self.train_size or 1):
            left = f"{len(order):,} of {len(train):,} training images are not held out"
            raise UserError(f"data: {left}; lower data.val_size or data.train_size")
        if self.test_every_epoch:
            val = test
        elif self.folds or self.val_size is not None or not val:
            val = train.select(held_out)
        splits = DatasetSplits(name, classes, train.select(order[: self.train_size].sort().values), test, val)
        for part in "train", "val", "test":
            found = {*getattr(splits, part).labels.tolist()}
            if missing := [one for label, one in enumerate(classes) if found and label not in found]:
                rank_zero_warn(f"{name}: the {part} split has no image of {shorten(', '.join(missing), 100)}")
        return splits

    def _order(self, labels: Tensor) -> Tensor:
        """Return the order in which training images are held out, then trained on."""
        if self.folds or self.val_split == "stratified":
            return stratify(labels, self.split_seed)
        if self.val_split == "last":
            return torch.arange(len(labels)).flip(0)
        return torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.split_seed))

    @cached_property
    def spec(self) -> ImageSpec:
        """Describe the images; measure on the training images what the config leaves open."""
        step = max(1, len(self.splits.train) // STATISTICS_SAMPLE) if self.num_workers else 1
        images, _ = self.splits.train[::step]
        shape: Any = tuple(images.shape[1:])
        channels = range(0 if self.mean and self.std else shape[0])
        moments = [torch.std_mean(images[:, channel].float() / 255, correction=0) for channel in channels]
        mean = self.mean or [mean.item() for _, mean in moments]
        std = self.std or [max(std.item(), 1 / 255) for std, _ in moments]
        if not len(mean) == len(std) == shape[0]:
            raise UserError(f"data.mean and data.std need one number for each of {shape[0]} channels")
        return ImageSpec(self.splits.name, shape, self.splits.classes, tuple(mean), tuple(std), self.preprocess)

    @property
    def train_batch_size(self) -> int:
        """Return the batch size per process."""
        count = len(self.splits.train)
        return self.batch_size or (128 if count >= 10_000 else 32 if count >= 100 else 8)

    def state_dict(self) -> dict[str, Any]:
        return self.spec._asdict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved, now = ImageSpec.from_dict(state_dict), self.spec
        # If the mean is measured, the same numbers mean the same images, whatever their folder's name.
        if (saved if self.mean else saved._replace(name=now.name)) != now:
            raise UserError("data: the run began with other images; set data.root")

    def _make_loader(self, split: LabeledImages, batch_size: int, seed: int | None = None) -> DataLoader:
        """Return a loader of index tensors for images in memory, otherwise of images and labels."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        device = "cpu" if self.num_workers else self.device
        sampler: Any = IndexBatchSampler(len(split), batch_size, seed, rank, world_size, device)
        if seed is not None and self.sampler == "weighted":
            labels = split.labels.cpu()
            sampler.weights = 1 / labels.bincount()[labels]  # draws each class equally often
        options: Any = {"sampler": sampler, "batch_size": None}  # the sampler makes the batches
        if not self.num_workers:
            return DataLoader(torch.arange(len(split), device=device), **options)  # type: ignore[arg-type]
        # With too little shared memory, PyTorch would wait forever.
        options |= {"num_workers": self.num_workers, "persistent_workers": True, "timeout": WORKER_TIMEOUT}
        return DataLoader(split, pin_memory=torch.cuda.is_available(), **options)

    def train_dataloader(self) -> DataLoader:
        is_overfitting = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._make_loader(self.splits.train, self.train_batch_size, None if is_overfitting else self.seed)

    def val_dataloader(self) -> DataLoader | list:
        val: Any = self.splits.val
        return self._make_loader(val, self.eval_batch_size) if val else []

    def test_dataloader(self) -> DataLoader:
        return self._make_loader(self.splits.test, self.eval_batch_size)

    predict_dataloader = test_dataloader

    def raw_batches(self, split: Literal["train", "test"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a split's uint8 images and labels in order, neither augmented nor normalised."""
        every = getattr(self.splits, split)
        for batch in self._make_loader(every, self.eval_batch_size):
            yield every[batch] if isinstance(batch, Tensor) else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer: Any = self.trainer
        if isinstance(batch, Tensor):
            is_example = batch.is_floating_point()  # the input that Lightning summarises the network with
            if is_example or (trainer.training and getattr(trainer.strategy, "wants_indices", False)):
                return batch
        if trainer.training:
            self.seed_augmentation()
        return self.make_batch(batch)

    def seed_augmentation(self) -> None:
        """Seed the generator of the augmentation by the batch, as a resumed run must, and set the progress."""
        trainer: Any = self.trainer
        batch_number = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self.generator.manual_seed(hash_seed(self.seed, batch_number, trainer.global_rank))
        progress = trainer.global_step / trainer.estimated_stepping_batches
        if isinstance(self.progress, Tensor):
            self.progress.fill_(progress)
        else:
            self.progress = progress

    def make_batch(self, batch: Any) -> Batch:
        """Normalise, and for training augment, the images at these indices or those that a worker process has read."""
        trainer: Any = self.trainer
        is_validation = trainer.validating or trainer.sanity_checking
        split: Any = self.splits.train if trainer.training else self.splits.val if is_validation else self.splits.test
        images, labels = split[batch] if isinstance(batch, Tensor) else batch
        teacher_log_probs = None
        if self.soft_labels and trainer.training:
            batches = trainer.current_epoch * trainer.num_training_batches
            progress = batches / (trainer.accumulate_grad_batches * trainer.estimated_stepping_batches)
            epoch = split.images, self.augment, self.spec, trainer.current_epoch, progress
            images, teacher_log_probs = self.soft_labels.prepare_epoch(*epoch)(images, batch)
        elif self.augment and trainer.training:
            images = self.augment(images.float(), self.generator, self.progress)
        # Lightning converts a batch to trainer.precision before it has floats.
        images = trainer.precision_plugin.convert_input(self.spec.normalize(images))
        return Batch(images, labels, teacher_log_probs)
