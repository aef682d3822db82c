"""Images of classes as a LightningDataModule: in memory, on the training device, or read by workers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from src.data.augment import RandomAffine
from src.data.batches import IndexBatches, in_memory_loader, seed_of, worker_loader
from src.data.sources import Images, Sets, Source, in_memory
from src.data.spec import ImageSpec
from src.errors import UserError
from src.values import Count, Fraction, Positive, Seed, Text, Whole

SAMPLED = 2000  # pictures that the mean and the deviation are taken from where workers read them


class ImageData(L.LightningDataModule):
    """Batches of ([N, C, H, W] normalised images, [N] labels) from a `source` of src.data.sources below `root`.

    `val_size` images are held out of the training images, drawn by `split_seed`, or for None the last ones: a writer's
    images stand together in MNIST, so that those are of other writers, as the test images are. Of the rest `train_size`
    are trained on, of which those of a smaller number are a part; None: all. `batch_size` is that of one process. None
    for `batch_size` is 128, or 32 for fewer than 10,000 images; for `val_size` a tenth, at most 5,000. `seed` keys the
    order and the augmentation.
    With `val_on_test` the test images are scored after every epoch: that draws a curve, and must never choose.
    With `reinforce`, of src.teachers, the batches for training have a third part, a teacher's answers: [N, classes]
    log-probabilities; `seed` keys the order alone then.
    With `workers` the images stay where they are, and so many processes read each batch.
    `mean` and `std` are fractions of white, one a channel; None: those of the training images.
    `spec` tells what there is once `prepare_data` has been called.
    """

    def __init__(
        self,
        source: Source,
        root: Text = "data",
        seed: Seed = 0,
        batch_size: Count | None = None,
        augment: RandomAffine | None = None,
        reinforce: Any = None,
        val_size: Whole | None = None,
        train_size: Count | None = None,
        val_on_test: bool = False,
        split_seed: Seed | None = 0,
        eval_batch_size: Count = 1000,
        workers: Count | None = None,
        preprocess: Literal["digit", "resize"] = "resize",
        mean: Sequence[Fraction] | None = None,
        std: Sequence[Positive] | None = None,
    ) -> None:
        super().__init__()
        if workers and reinforce:
            raise UserError("data.reinforce needs its images in memory; set data.workers=null")
        self.source = source
        self.root = Path(root).expanduser()
        self.batch_size = batch_size
        self.seed = seed
        self.augment = augment
        self.reinforce = reinforce
        self.view: tuple[int, Any] | None = None  # of which epoch
        self.val_size = val_size
        self.train_size = train_size
        self.val_on_test = val_on_test
        self.split_seed = split_seed
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.preprocess = preprocess
        self.mean, self.std = mean, std
        self.sets: Sets | None = None
        self.val: Images | Dataset = Subset(Images, [])  # type: ignore[arg-type]
        self._spec: ImageSpec | None = None
        self.device = torch.device("cpu")
        self.generator = torch.Generator()
        self.progress: float | Tensor = 0.0  # a tensor where a CUDA graph reads it

    def prepare_data(self) -> None:
        if self.sets is None:  # fit has read them, for test
            self.source.prepare(self.root)

    def setup(self, stage: str | None = None) -> None:
        if self.sets is None:
            self._read()
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        self.progress = 0.0
        if device != self.generator.device:
            self.generator = torch.Generator(device)
        if device != self.device and self.sets and not self.workers:
            self.device = device
            train, test, self.val = (_put(part, device) for part in (self.sets.train, self.sets.test, self.val))
            self.sets = self.sets._replace(train=train, test=test)

    def _read(self) -> None:
        read = self.source.read(self.root)
        train, test = (read.train, read.test) if self.workers else (in_memory(read.train), in_memory(read.test))
        count = _count(train)
        val_size = min(count // 10, 5000) if self.val_size is None else self.val_size
        if val_size >= count:
            raise UserError(f"data.val_size={val_size}: {read.name} has {count:,} training images; use fewer")
        if self.train_size and self.train_size > count - val_size:
            left = f"{count - val_size:,} images are not held out"
            raise UserError(f"data.train_size={self.train_size}: {left}; use fewer")
        if self.split_seed is None:
            order = torch.arange(count).flip(0)
        else:
            order = torch.randperm(count, generator=torch.Generator().manual_seed(self.split_seed))
        held_out, kept = order[:val_size], order[val_size:][: self.train_size].sort().values
        self.sets = read._replace(train=_part(train, kept), test=test)
        self.val = test if self.val_on_test else _part(train, held_out)
        self._spec = self._describe(self.sets)

    def _describe(self, sets: Sets) -> ImageSpec:
        count = _count(sets.train)
        every = 1 if isinstance(sets.train, Images) else max(1, count // SAMPLED)
        some = in_memory(_part(sets.train, torch.arange(0, count, every)) if every > 1 else sets.train)
        channels, height, width = shape = tuple(some.images.shape[1:])
        if self.preprocess == "digit" and shape != (1, 28, 28):
            raise UserError(f"data.preprocess=digit: {sets.name} has images of {shape}; use resize")
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

    def _loader(self, part: Images | Dataset, size: int, seed: int | None = None, index: bool = False) -> DataLoader:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if not isinstance(part, Images):
            assert self.workers
            return worker_loader(part, self.workers, _count(part), size, seed, rank, world_size)
        device = part.images.device
        places = torch.arange(len(part.labels), device=device)
        batches = IndexBatches(len(part.labels), size, seed, rank, world_size, device)
        if index and self._gives_places:
            return in_memory_loader([places], batches)
        return in_memory_loader((*part, places) if index else part, batches)

    @property
    def train_batch_size(self) -> int:
        assert self.sets is not None
        return self.batch_size or (128 if _count(self.sets.train) >= 10_000 else 32)

    def train_dataloader(self) -> DataLoader:
        assert self.sets is not None
        overfit = self.trainer and self.trainer.overfit_batches  # type: ignore[attr-defined]
        seed = None if overfit else self.seed  # the same batches in every epoch
        index = self._gives_places or self.reinforce is not None
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
        return not self.workers and getattr(getattr(self.trainer, "strategy", None), "wants_places", False)

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
        self.generator.manual_seed(seed_of(self.seed, batch_number, self.trainer.global_rank))
        progress = self.trainer.global_step / self.trainer.estimated_stepping_batches
        if isinstance(self.progress, Tensor):
            self.progress.fill_(progress)
        else:
            self.progress = progress

    def batch(self, places: Tensor) -> Any:
        """Of the training images at these places."""
        assert self.sets and isinstance(self.sets.train, Images)
        return self._seen(*(part[places] for part in self.sets.train), *[places] * bool(self.reinforce))

    def _seen(self, images: Tensor, labels: Tensor, *index: Tensor) -> Any:
        batch: tuple[Tensor, ...]
        if index:
            assert self.trainer and self.reinforce
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
            assert self.trainer and self.reinforce and self.sets
            batches = epoch * self.trainer.num_training_batches
            progress = batches / (self.trainer.accumulate_grad_batches * self.trainer.estimated_stepping_batches)
            augment, images = self.augment or RandomAffine(), in_memory(self.sets.train).images
            self.view = epoch, self.reinforce.view(images, augment, self.spec, epoch, progress)
        return self.view[1]


def _count(part: Any) -> int:
    return len(part.labels) if isinstance(part, Images) else len(part)


def _part(whole: Any, index: Tensor) -> Any:
    return Images(*(each[index] for each in whole)) if isinstance(whole, Images) else Subset(whole, index.tolist())


def _put(part: Any, device: torch.device) -> Images:
    return Images(*(each.to(device) for each in part))
