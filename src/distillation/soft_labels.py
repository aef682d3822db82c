"""Training images with what larger networks say of them, asked once for all runs (https://arxiv.org/abs/2303.08983)."""

import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from filelock import FileLock
from torch import Tensor

from src.core.errors import UserError
from src.core.files import write_atomically
from src.core.process import has_amx_bf16
from src.core.value_types import NonEmptyStr, Seed
from src.data.augment import AugmentationSample, RandomAffine
from src.data.image_spec import ImageSpec
from src.data.sampler import make_generator
from src.training.checkpoints import load_weights_only, sealed
from src.training.console import make_bar
from src.training.run_record import get_device_name

AT_ONCE = 250  # images; other batches would give other last bits


class Teacher(Protocol):
    digest: str  # another one where the answers are others

    def to(self, device: torch.device) -> Callable[[Tensor], Tensor]: ...


class EpochSoftLabels(NamedTuple):
    """All N training images as one epoch sees them."""

    augment: RandomAffine
    draws: AugmentationSample
    progress: float
    answers: Tensor  # [N, classes] log-probabilities

    def batch(self, images: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The augmented images, whose places among the N are `index`, and the answers to them."""
        return self.augment.apply(images.float(), self.draws.of(index), self.progress), self.answers[index]


class SoftLabels:
    """Each epoch's draws of the augmentation, keyed by `seed` and no other, and the answers of `teacher` to them.

    The answers are worked out where an epoch begins, and kept in `folder`, a file an epoch: a run that differs in
    its own seed alone finds them there. Those of a device other than the CPU, in other last bits, have its name and
    the precision of its convolutions in the file's name; on a processor with AMX it is asked in bfloat16.
    """

    def __init__(self, teacher: Teacher, folder: NonEmptyStr, seed: Seed = 0) -> None:
        self.teacher, self.folder, self.seed = teacher, Path(folder), seed

    def view(
        self, images: Tensor, augment: RandomAffine, spec: ImageSpec, epoch: int, progress: float
    ) -> EpochSoftLabels:
        """`images`: [N, C, H, W], uint8, all of them; `progress`: the fraction of the run when the epoch begins."""
        drawn = augment.draw(len(images), make_generator(self.seed, epoch))  # on the CPU: alike for every device
        draws = drawn.to(images.device)
        key = hashlib.sha256(images.cpu().numpy().tobytes())
        asked = self.teacher.digest, sorted(vars(augment).items()), spec.mean, spec.std, self.seed, epoch, progress
        key.update(repr(asked).encode())
        file = self.folder / f"{key.hexdigest()[:16]}{_made_on(images.device)}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock")):  # of runs side by side, one asks
            if not file.exists():
                answers = self._ask(images, augment, draws, spec, progress, epoch)
                write_atomically(file, sealed(answers.cpu(), key.hexdigest()))
        try:
            answers = load_weights_only(file, key.hexdigest())
        except UserError as error:
            raise UserError(f"{file}: damaged; delete it, and the teacher is asked again ({error})") from error
        answers = answers.to(images.device)
        return EpochSoftLabels(augment, draws, progress, answers)

    def _ask(
        self,
        images: Tensor,
        augment: RandomAffine,
        draws: AugmentationSample,
        spec: ImageSpec,
        progress: float,
        epoch: int,
    ) -> Tensor:
        print(f"asking the teacher about epoch {epoch + 1}; kept in {self.folder} for further runs", file=sys.stderr)
        teacher, parts = self.teacher.to(images.device), torch.arange(len(images), device=images.device).split(AT_ONCE)
        in_tiles = images.device.type == "cpu" and has_amx_bf16()

        def answers(some: Tensor) -> Tensor:
            seen = spec.normalize(augment.apply(images[some].float(), draws.of(some), progress))
            with torch.autocast("cpu", torch.bfloat16, enabled=in_tiles):  # the network alone: places are not rounded
                return teacher(seen).float()

        with torch.inference_mode(), make_bar(len(parts)) as shown:
            description = f"the teacher's answers for epoch {epoch + 1}"
            return torch.cat([answers(some) for some in shown.track(parts, description=description)])


def _made_on(device: torch.device) -> str:
    if device.type == "cpu":
        return "-bfloat16" if has_amx_bf16() else ""
    precision = "tf32" if device.type == "cuda" and torch.backends.cudnn.allow_tf32 else "float32"
    return f"-{re.sub(r'[^a-z0-9]+', '-', get_device_name(device).lower())}-{precision}"
