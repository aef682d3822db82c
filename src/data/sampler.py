"""Draw the batches of an epoch as index tensors, in an order that depends on seed and epoch alone."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import SequentialSampler


def hash_seed(*keys: int) -> int:
    """Hash integers, in this order, to a seed below 2⁶³."""
    seed = 0
    for key in keys:
        seed = (seed ^ key) * 6364136223846793005 + 1442695040888963407 & 2**63 - 1
        seed ^= seed >> 29
    return seed


class IndexBatchSampler(SequentialSampler):  # Lightning replaces any other sampler for trainer.overfit_batches
    """Yield indices that cover `range(size)` once per epoch, over all processes together; `batch_size` is per process.

    Seed and epoch, which Lightning sets, key the permutation; without a seed the order is 0, 1, 2, … With `weights`,
    [size], an epoch draws as many indices with replacement, in proportion to their weights.
    """

    weights: torch.Tensor | None = None

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
        self.epoch = 0
        # Where the batches of all processes end. A remainder with fewer images than processes joins the last one.
        self.ends = range(batch_size * world_size, size - world_size + 1, batch_size * world_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.ends) + 1

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        order = torch.arange(self.size)
        if self.seed is not None:  # the generator is always the CPU's, so that every device gets the same order
            generator = torch.Generator().manual_seed(hash_seed(self.seed, self.epoch))
            order = torch.randperm(self.size, generator=generator)
            if self.weights is not None:
                order = self.weights.multinomial(self.size, replacement=True, generator=generator)
        for batch in order.to(self.device).tensor_split(list(self.ends)):
            yield batch.tensor_split(self.world_size)[self.rank] if self.world_size > 1 else batch
