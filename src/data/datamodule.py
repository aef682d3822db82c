"""Labelled images as a LightningDataModule: in memory on the training device, or read by worker processes."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt, Seed, UnitInterval
from src.data.augment import RandomAffine
from src.data.datasets import DatasetSplits, LabeledImages, load_into_memory
from src.data.image_spec import ImageSpec
from src.data.sampler import IndexBatchSampler, hash_seed

STATISTICS_SAMPLE = 2000  # images that mean and standard deviation are measured on if worker processes read them


class Batch(NamedTuple):
    """The input of a step. It iterates over what is not None: `images, labels = batch` works without soft labels."""

    images: Tensor  # [N, C, H, W], normalised
    labels: Tensor  # [N]
    teacher_log_probs: Tensor | None = None  # [N, classes]

    def __iter__(self) -> Iterator[Tensor]:
        return (part for part in (self.images, self.labels, self.teacher_log_probs) if part is not None)


class ImageDataModule(L.LightningDataModule):
    """Serve the images of a class of src.data.datasets, normalised and, for training, augmented.

    `val_size` training images are held out, at random or the last ones: MNIST is ordered by writer, so validation is
    then writer-disjoint, like the test. A smaller `train_size` trains on a subset of a larger one. `seed` keys order
    and augmentation; `soft_labels`, of src.distillation, has its own. conf/data/images.yaml has units and defaults.
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
        val_split: Literal["random", "last"] = "random",
        split_seed: Seed = 0,
        eval_batch_size: PositiveInt = 1000,
        num_workers: PositiveInt | None = None,
        preprocess: Literal["mnist", "resize"] = "resize",
        mean: Sequence[UnitInterval] | None = None,
        std: Sequence[PositiveFloat] | None = None,
    ) -> None:
        super().__init__()
        if num_workers and soft_labels:
            raise UserError("data.soft_labels needs its images in memory; set data.num_workers=null")
        self.dataset, self.root, self.seed = dataset, Path(root).expanduser(), seed
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.augment, self.soft_labels = augment, soft_labels
        self.val_size, self.train_size, self.test_every_epoch = val_size, train_size, test_every_epoch
        self.val_split, self.split_seed = val_split, split_seed
        self.preprocess, self.mean, self.std = preprocess, mean, std
        self.is_prepared = False
        self.epoch_soft_labels: tuple[int, Any] = -1, None  # with their epoch
        self.device = torch.device("cpu")
        self.generator = torch.Generator()
        self.progress: float | Tensor = 0.0  # fraction of the run that is done; a tensor if a CUDA graph reads it

    def prepare_data(self) -> None:
        if not self.is_prepared:  # Lightning prepares for the test again
            self.dataset.download(self.root)
        self.is_prepared = True

    def setup(self, stage: str | None = None) -> None:
        self.progress = 0.0
        self.device = self.trainer.strategy.root_device if self.trainer else self.device
        self.generator = torch.Generator(self.device)
        for name in "train", "test", "val":
            if isinstance(split := getattr(self.splits, name), LabeledImages):
                moved = LabeledImages(split.images.to(self.device), split.labels.to(self.device))
                self.splits = self.splits._replace(**{name: moved})  # type: ignore[arg-type]

    @cached_property
    def splits(self) -> DatasetSplits:
        """Load the images and hold the validation images out of the training images."""
        splits = self.dataset.load(self.root)
        if not self.num_workers:
            splits = splits._replace(train=load_into_memory(splits.train), test=load_into_memory(splits.test))
        count = _count(splits.train)
        val_size = min(count // 10, 5000) if self.val_size is None else self.val_size
        if val_size >= count:
            raise UserError(f"data.val_size={val_size}: {splits.name} has {count:,} training images; use fewer")
        if self.train_size and self.train_size > (rest := count - val_size):
            raise UserError(f"data.train_size={self.train_size}: {rest:,} images are not held out; use fewer")
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))
        order = shuffled if self.val_split == "random" else torch.arange(count).flip(0)
        train = _select(splits.train, order[val_size:][: self.train_size].sort().values)
        val = splits.test if self.test_every_epoch else _select(splits.train, order[:val_size])
        return splits._replace(train=train, val=val)

    @cached_property
    def spec(self) -> ImageSpec:
        """Describe the images; measure on the training images what the config leaves open."""
        train, count = self.splits.train, _count(self.splits.train)
        if self.num_workers:
            train = _select(train, torch.arange(0, count, max(1, count // STATISTICS_SAMPLE)))
        images = load_into_memory(train).images
        shape: Any = tuple(images.shape[1:])
        if self.preprocess == "mnist" and shape != (1, 28, 28):
            raise UserError(f"data.preprocess=mnist: {self.splits.name} has images of {shape}; use resize")
        is_given = self.mean and self.std
        moments = [torch.std_mean(images[:, c].float() / 255, correction=0) for c in range(0 if is_given else shape[0])]
        mean = self.mean or [mean.item() for _, mean in moments]
        std = self.std or [max(std.item(), 1 / 255) for std, _ in moments]
        if not len(mean) == len(std) == shape[0]:
            raise UserError(f"data.mean and data.std need one number for each of {shape[0]} channels")
        return ImageSpec(self.splits.name, shape, self.splits.classes, tuple(mean), tuple(std), self.preprocess)

    @property
    def train_batch_size(self) -> int:
        """Return the batch size per process."""
        return self.batch_size or (128 if _count(self.splits.train) >= 10_000 else 32)

    def state_dict(self) -> dict[str, Any]:
        return self.spec.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (saved := ImageSpec.from_dict(state_dict)) != self.spec:
            raise UserError(f"data: the run began with other images ({saved}) than now ({self.spec}); set data.root")

    def _make_loader(self, split: Any, batch_size: int, seed: int | None = None) -> DataLoader:
        """Return a loader of index tensors for images in memory, otherwise of images and labels."""
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        device = self.device if isinstance(split, LabeledImages) else None
        sampler: Any = IndexBatchSampler(_count(split), batch_size, seed, rank, world_size, device)
        if isinstance(split, LabeledImages):
            return DataLoader(torch.arange(sampler.size, device=device), sampler=sampler, batch_size=None)  # type: ignore[arg-type]
        options: Any = {"num_workers": self.num_workers, "persistent_workers": True}
        return DataLoader(split, batch_sampler=sampler, pin_memory=torch.cuda.is_available(), **options)

    def train_dataloader(self) -> DataLoader:
        is_overfitting = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        return self._make_loader(self.splits.train, self.train_batch_size, None if is_overfitting else self.seed)

    def val_dataloader(self) -> DataLoader | list:
        return self._make_loader(self.splits.val, self.eval_batch_size) if _count(self.splits.val) else []

    def test_dataloader(self) -> DataLoader:
        return self._make_loader(self.splits.test, self.eval_batch_size)

    predict_dataloader = test_dataloader

    def raw_batches(self, split: Literal["train", "test"]) -> Iterator[LabeledImages]:
        """Yield a split's uint8 images in order, neither augmented nor normalised."""
        images = getattr(self.splits, split)
        for batch in self._make_loader(images, self.eval_batch_size):
            yield _select(images, batch) if isinstance(batch, Tensor) else LabeledImages(*batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer: Any = self.trainer
        if isinstance(batch, Tensor):
            is_example = batch.is_floating_point()  # the input that Lightning summarises the network with
            if is_example or (trainer.training and getattr(trainer.strategy, "wants_indices", False)):
                return batch
        if trainer.training:
            self.begin_batch()
        return self.make_batch(batch)

    def begin_batch(self) -> None:
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
        teacher_log_probs, is_validation = None, trainer.validating or trainer.sanity_checking
        split = self.splits.train if trainer.training else self.splits.val if is_validation else self.splits.test
        images, labels = _select(split, batch) if isinstance(batch, Tensor) else batch
        if self.soft_labels and trainer.training:
            images, teacher_log_probs = self._get_epoch_soft_labels(trainer)(images, batch)
        elif self.augment and trainer.training:
            images = self.augment(images.float(), self.generator, self.progress)
        # Lightning converts a batch to trainer.precision before it has floats.
        images = trainer.precision_plugin.convert_input(self.spec.normalize(images))
        return Batch(images, labels, teacher_log_probs)

    def _get_epoch_soft_labels(self, trainer: Any) -> Any:
        epoch = trainer.current_epoch
        if self.epoch_soft_labels[0] != epoch:
            batches = epoch * trainer.num_training_batches
            progress = batches / (trainer.accumulate_grad_batches * trainer.estimated_stepping_batches)
            images, augment = load_into_memory(self.splits.train).images, self.augment or RandomAffine()
            self.epoch_soft_labels = epoch, self.soft_labels.prepare_epoch(images, augment, self.spec, epoch, progress)
        return self.epoch_soft_labels[1]


def _count(split: Any) -> int:
    return len(split.labels if isinstance(split, LabeledImages) else split)


def _select(split: Any, indices: Tensor) -> Any:
    if isinstance(split, LabeledImages):
        return LabeledImages(split.images[indices], split.labels[indices])
    return Subset(split, indices.tolist())
