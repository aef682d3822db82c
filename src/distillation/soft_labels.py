"""Cache teacher outputs for augmented images (https://arxiv.org/abs/2303.08983); src.models.classifier has the loss."""

import hashlib
import io
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor

from src.core.errors import UserError
from src.core.files import write_atomically
from src.core.process import has_amx_bf16
from src.core.value_types import NonEmptyStr, Seed
from src.data.augment import RandomAffine
from src.data.image_spec import ImageSpec
from src.data.sampler import hash_seed
from src.training.checkpoints import load_weights_only
from src.training.predictor import load_predictor

BATCH_SIZE = 250  # a constant, because other batches would give other last bits


class SoftLabels:
    """Compute and cache the mean log-probabilities of `teachers`, run folders, .ckpt or .pt files, for each epoch.

    `seed` alone keys the augmentation, so that runs with other seeds find the same files in `folder`. A processor with
    AMX computes in bfloat16; its files, and those of a GPU, have other names, because their last bits differ.
    """

    def __init__(self, teachers: Sequence[NonEmptyStr], folder: NonEmptyStr, seed: Seed = 0) -> None:
        self.teachers = [load_predictor(teacher) for teacher in teachers]
        self.digest = hashlib.sha256(b"".join(teacher.file.read_bytes() for teacher in self.teachers)).hexdigest()
        self.folder, self.seed = Path(folder), seed
        self.prepare_epoch = lru_cache(maxsize=1)(self._prepare_epoch)  # every batch asks for its epoch

    def _prepare_epoch(
        self, images: Tensor, augment: RandomAffine | None, spec: ImageSpec, epoch: int, progress: float
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Load or compute an epoch's soft labels of all training images; `progress` is that when the epoch begins.

        Return a function from a batch's images and indices to augmented images and soft labels, [batch, classes].
        """
        augment = augment or RandomAffine()
        for teacher in self.teachers:
            if (teacher.spec.shape, teacher.spec.classes) != (spec.shape, spec.classes):
                reason = "was trained on images of another shape, or with other classes"
                raise UserError(f"data.soft_labels.teachers: {teacher.file} {reason}; name other teachers")
        # Drawn on the CPU, so that every device gets the same numbers.
        generator = torch.Generator().manual_seed(hash_seed(self.seed, epoch))
        sample = [x.to(images.device) for x in augment.draw(len(images), generator)]

        def augment_batch(batch: Tensor, indices: Tensor) -> Tensor:
            return augment.apply(batch.float(), [numbers[indices] for numbers in sample], progress)

        rounding = images.device.type, has_amx_bf16(), torch.backends.cudnn.allow_tf32
        settings = self.digest, sorted(vars(augment).items()), spec.mean, spec.std, self.seed, epoch, progress
        key = hashlib.sha256(images.cpu().numpy().tobytes() + repr((settings, rounding)).encode()).hexdigest()[:16]
        file = self.folder / f"{key}.pt"
        with FileLock(file.with_suffix(".lock")):  # one of several concurrent runs computes
            if not file.exists():
                print(f"computing teacher outputs, epoch {epoch + 1} (cached in {self.folder})", file=sys.stderr)
                buffer = io.BytesIO()
                torch.save(self._compute(images, augment_batch, spec).cpu(), buffer)
                write_atomically(file, buffer.getvalue())
        try:
            log_probs = load_weights_only(file).to(images.device)
        except UserError as error:
            raise UserError(f"{error}; delete it and it is computed again") from error
        return lambda batch, indices: (augment_batch(batch, indices), log_probs[indices])

    def _compute(self, images: Tensor, augment_batch: Callable[[Tensor, Tensor], Tensor], spec: ImageSpec) -> Tensor:
        for teacher in self.teachers:
            teacher.to(images.device)
        outputs, use_bf16 = [], images.device.type == "cpu" and has_amx_bf16()
        batches = torch.arange(len(images), device=images.device).split(BATCH_SIZE)
        with torch.inference_mode():
            for indices in track(batches, "teacher outputs", transient=True, disable=not sys.stdout.isatty()):
                normalized = spec.normalize(augment_batch(images[indices], indices))
                with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):  # the networks alone
                    log_probs = [teacher.log_probabilities(normalized) for teacher in self.teachers]
                outputs.append(torch.stack(log_probs).mean(dim=0).float())
        return torch.cat(outputs)
