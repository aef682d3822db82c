"""Images of classes as a LightningDataModule: in memory, on the training device, or read by num_workers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, NonNegativeInt, PositiveFloat, PositiveInt, Seed, UnitInterval
from src.data.augment import RandomAffine
from src.data.datasets import DatasetSplits, ImageDataset, LabeledImages, load_into_memory
from src.data.image_spec import ImageSpec
from src.data.sampler import IndexBatchSampler, hash_seed, make_in_memory_loader, make_worker_loader

SAMPLED = 2000  # pictures that the mean and the deviation are taken from where num_workers read them


class ImageDataModule(L.LightningDataModule):
    """Batches of ([N, C, H, W] normalised images, [N] labels) from a `dataset` of src.data.datasets below `root`.

    `val_size` images are held out of the training images, drawn by `split_seed`, or the last ones: a writer's
    images stand together in MNIST, so that those are of other writers, as the test images are. Of the rest `train_size`
    are trained on, of which those of a smaller number are a part; None: all. `batch_size` is that of one process. None
    for `batch_size` is 128, or 32 for fewer than 10,000 images; for `val_size` a tenth, at most 5,000. `seed` keys the
    order and the augmentation.
    With `test_every_epoch` the test images are scored after every epoch: that draws a curve, and must never choose.
    With `soft_labels`, of src.teachers, the batches for training have a third part, a teacher's answers: [N, classes]
    log-probabilities; `seed` keys the order alone then.
    With `num_workers` the images stay where they are, and so many processes read each batch.
    `mean` and `std` are fractions of white, one a channel; None: those of the training images.
    `spec` tells what there is once `prepare_data` has been called.
    """

    def __init__(
        self,
        dataset: ImageDataset,
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
        self.dataset = dataset
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.soft_labels = soft_labels
        self.view: tuple[int, Any] | None = None  # of which epoch
        self.val_size = val_size
        self.train_size = train_size
        self.test_every_epoch = test_every_epoch
        self.val_split, self.split_seed = val_split, split_seed
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.preprocess = preprocess
        self.mean, self.std = mean, std
        self.sets: DatasetSplits | None = None
        self.val: LabeledImages | Dataset = Subset(LabeledImages, [])  # type: ignore[arg-type]
        self._spec: ImageSpec | None = None
        self.device = torch.device("cpu")
        self.generator = torch.Generator()
        self.progress: float | Tensor = 0.0  # a tensor where a CUDA graph reads it

    def prepare_data(self) -> None:
        if self.sets is None:  # fit has read them, for test
            self.dataset.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        if self.sets is None:
            self._read()
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.progress = 0.0
        if device != self.generator.device:
            self.generator = torch.Generator(device)
        if device != self.device and self.sets and not self.num_workers:
            self.device = device
            train, test, self.val = (_put(part, device) for part in (self.sets.train, self.sets.test, self.val))
            self.sets = self.sets._replace(train=train, test=test)

    def _read(self) -> None:
        read = self.dataset.read(self.root)
        train, test = (
            (read.train, read.test) if self.num_workers else (load_into_memory(read.train), load_into_memory(read.test))
        )
        count = _count(train)
        val_size = min(count // 10, 5000) if self.val_size is None else self.val_size
        if val_size >= count:
            raise UserError(f"data.val_size={val_size}: {read.name} has {count:,} training images; use fewer")
        if self.train_size and self.train_size > count - val_size:
            left = f"{count - val_size:,} images are not held out"
            raise UserError(f"data.train_size={self.train_size}: {left}; use fewer")
        if self.val_split == "last":
            order = torch.arange(count).flip(0)
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))
        held_out, kept = order[:val_size], order[val_size:][: self.train_size].sort().values
        self.sets = read._replace(train=_part(train, kept), test=test)
        self.val = test if self.test_every_epoch else _part(train, held_out)
        self._spec = self._describe(self.sets)

    def _describe(self, sets: DatasetSplits) -> ImageSpec:
        count = _count(sets.train)
        every = 1 if isinstance(sets.train, LabeledImages) else max(1, count // SAMPLED)
        some = load_into_memory(_part(sets.train, torch.arange(0, count, every)) if every > 1 else sets.train)
        channels, height, width = shape = tuple(some.images.shape[1:])
        if self.preprocess == "mnist" and shape != (1, 28, 28):
            raise UserError(f"data.preprocess=mnist: {sets.name} has images of {shape}; use resize")
        mean, std = self.mean, self.std
        if mean is None or std is None:
            levels = torch.arange(256, dtype=torch.float64)
            counts = [torch.bincount(some.images[:, c].flatten().int(), minlength=256) for c in range(shape[0])]
            means = [float(each @ levels / each.sum()) for each in map(Tensor.double, counts)]
            squares = [float(each @ levels**2 / each.sum()) for each in map(Tensor.double, counts)]
            mean = mean or [m / 255 for m in means]
            std = std or [max((s - m * m) ** 0.5, 1.0) / 255 for s, m in zip(squares, means, strict=True)]
        if not len(mean) == len(std) == shape[0]:
            raise UserError(f"data.mean and data.std need a number for each of {shape[0]} channels")
        return ImageSpec(sets.name, (channels, height, width), sets.classes, tuple(mean), tuple(std), self.preprocess)

    @property
    def spec(self) -> ImageSpec:
        if self._spec is None:
            self._read()
        assert self._spec is not None
        return self._spec

    def state_dict(self) -> dict[str, Any]:
        return self.spec.plain()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if (before := ImageSpec.of(state_dict)) != self.spec:
            raise UserError(f"the run was begun with other images: {before}, here they are {self.spec}")

    def _loader(
        self, part: LabeledImages | Dataset, size: int, seed: int | None = None, index: bool = False
    ) -> DataLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if not isinstance(part, LabeledImages):
            assert self.num_workers
            return make_worker_loader(part, self.num_workers, _count(part), size, seed, rank, world_size)
        device = part.images.device
        places = torch.arange(len(part.labels), device=device)
        batches = IndexBatchSampler(len(part.labels), size, seed, rank, world_size, device)
        if index and self._gives_places:
            return make_in_memory_loader([places], batches)
        return make_in_memory_loader((*part, places) if index else part, batches)

    @property
    def train_batch_size(self) -> int:
        assert self.sets is not None
        return self.batch_size or (128 if _count(self.sets.train) >= 10_000 else 32)

    def train_dataloader(self) -> DataLoader:
        assert self.sets is not None
        overfit = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        seed = None if overfit else self.seed  # the same batches in every epoch
        index = self._gives_places or self.soft_labels is not None
        return self._loader(self.sets.train, self.train_batch_size, seed, index)

    def val_dataloader(self) -> DataLoader | list:
        return self._loader(self.val, self.eval_batch_size) if _count(self.val) else []

    def test_dataloader(self) -> DataLoader:
        assert self.sets is not None
        return self._loader(self.sets.test, self.eval_batch_size)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    @property
    def _gives_places(self) -> bool:
        """Whether the loader for training gives the places of images alone, which the strategy makes a batch of."""
        return not self.num_workers and getattr(getattr(self.trainer, "strategy", None), "wants_indices", False)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if isinstance(batch, Tensor) or len(batch) == 1:  # an example input, of which Lightning makes a summary; places
            return batch
        if self.trainer and self.trainer.training:
            self.begin_batch()
        return self._seen(*batch)

    def begin_batch(self) -> None:
        """Keyed by the batch, so that a resumed run draws what the uninterrupted one would have drawn."""
        assert self.trainer
        batch_number = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
        self.generator.manual_seed(hash_seed(self.seed, batch_number, self.trainer.global_rank))
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        if isinstance(self.progress, Tensor):
            self.progress.fill_(progress)
        else:
            self.progress = progress

    def batch(self, places: Tensor) -> Any:
        """Of the training images at these places."""
        assert self.sets and isinstance(self.sets.train, LabeledImages)
        return self._seen(*(part[places] for part in self.sets.train), *[places] * bool(self.soft_labels))

    def _seen(self, images: Tensor, labels: Tensor, *index: Tensor) -> Any:
        batch: tuple[Tensor, ...]
        if index:
            assert self.trainer and self.soft_labels
            images, answers = self._view_of(self.trainer.current_epoch).batch(images, *index)
            batch = self.spec.normalize(images), labels, answers
        else:
            if self.augment and self.trainer and self.trainer.training:
                images = self.augment(images.float(), self.generator, self.progress)
            batch = self.spec.normalize(images), labels
        # Lightning converts batches before this hook, when the images are bytes still.
        return self.trainer.precision_plugin.convert_input(batch) if self.trainer else batch

    def _view_of(self, epoch: int) -> Any:
        if self.view is None or self.view[0] != epoch:
            assert self.trainer and self.soft_labels and self.sets
            batches = epoch * self.trainer.num_training_batches
            progress = batches / (self.trainer.accumulate_grad_batches * self.trainer.estimated_stepping_batches)
            augment, images = self.augment or RandomAffine(), load_into_memory(self.sets.train).images
            self.view = epoch, self.soft_labels.view(images, augment, self.spec, epoch, progress)
        return self.view[1]


def _count(part: Any) -> int:
    return len(part.labels) if isinstance(part, LabeledImages) else len(part)


def _part(whole: Any, index: Tensor) -> Any:
    return (
        LabeledImages(*(each[index] for each in whole))
        if isinstance(whole, LabeledImages)
        else Subset(whole, index.tolist())
    )


def _put(part: Any, device: torch.device) -> LabeledImages:
    return LabeledImages(*(each.to(device) for each in part))
