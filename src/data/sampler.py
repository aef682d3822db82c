"""Batches as index tensors: one fancy-indexing call per batch, with no worker processes and no collation."""

from collections.abc import Iterable, Iterator
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from src.core.errors import UserError


class IndexBatchSampler(SequentialSampler):  # any other Lightning replaces for trainer.overfit_batches
    """Yields index tensors that cover `range(size)` once an epoch, over all `world_size` processes together.

    With a `seed` the order is a permutation that depends on the seed and the epoch alone; Lightning sets the
    epoch. Without one the order is 0, 1, 2, … `batch_size` is that of one process.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.seed, self.rank, self.world_size, self.device = size, seed, rank, world_size, device
        self.global_batch_size = batch_size * world_size
        self.epoch = 0
        self.start = 0
        rest = size % self.global_batch_size
        self.joined = rest if rest < world_size and size > self.global_batch_size else 0
        if size < world_size:
            raise UserError(f"{size} samples are too few for {world_size} processes; use fewer trainer.devices")

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Leaves out the first batches of the next pass, and of no other."""
        self.start = batches

    def __len__(self) -> int:
        return ceil((self.size - self.joined) / self.global_batch_size)

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        if self.seed is None:
            order = torch.arange(self.size)
        else:
            # The generator is always the CPU's, so that every device sees the same order.
            order = torch.randperm(self.size, generator=make_generator(self.seed, self.epoch))
        ends = [self.global_batch_size * n for n in range(1, len(self))]
        start, self.start = self.start, 0
        for batch in order.to(self.device).tensor_split(ends)[start:]:
            yield batch.tensor_split(self.world_size)[self.rank] if self.world_size > 1 else batch


def make_generator(*keys: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by whole numbers; other numbers, or another order, give another stream."""
    return torch.Generator(device).manual_seed(hash_seed(*keys))


def hash_seed(*keys: int) -> int:
    seed = 0
    for key in keys:
        seed = (seed ^ key) * 6364136223846793005 + 1442695040888963407 & 2**63 - 1
        seed ^= seed >> 29
    return seed


class _Lists(IndexBatchSampler):
    @property
    def sampler(self) -> Any:
        return self  # where Lightning looks for what has an epoch

    def __iter__(self) -> Iterator[list[int]]:  # type: ignore[override]
        return (batch.tolist() for batch in super().__iter__())


def make_in_memory_loader(tensors: Iterable[Tensor], batches: IndexBatchSampler) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), sampler=batches, batch_size=None)


def make_worker_loader(dataset: Dataset, workers: int, *batches: Any) -> DataLoader:
    """For what does not fit in memory: `workers` processes read; `batches` are the arguments of IndexBatches."""
    pin = torch.cuda.is_available()
    order = _Lists(*batches)
    return DataLoader(dataset, batch_sampler=order, num_workers=workers, persistent_workers=True, pin_memory=pin)  # type: ignore[arg-type]


def find_batch_sampler(loader: Any) -> IndexBatchSampler | None:
    """What orders a loader's batches, if it can be told to leave some out."""
    both = getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)
    return next((one for one in both if isinstance(one, IndexBatchSampler)), None)
