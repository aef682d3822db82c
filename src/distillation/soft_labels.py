"""Cache teacher outputs for augmented images (https://arxiv.org/abs/2303.08983); src.models.classifier has the loss."""

import hashlib
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from rich.progress import track
from torch import Tensor, nn

from src.core.errors import UserError
from src.core.files import write_atomically
from src.core.process import has_amx_bf16
from src.core.value_types import NonEmptyStr, Seed
from src.data.augment import RandomAffine
from src.data.image_spec import ImageSpec
from src.data.sampler import make_generator
from src.models.classifier import move_to_device
from src.training.checkpoints import load_weights_only
from src.training.predictor import load_predictor

BATCH_SIZE = 250  # a constant, because other batches would give other last bits


class Ensemble(nn.Module):
    """The mean of the log-probabilities of the networks in run folders, .ckpt or .pt files."""

    def __init__(self, files: Sequence[str]) -> None:
        super().__init__()
        if not files:
            raise UserError("data.soft_labels.teachers is empty; name run folders or .pt files")
        predictors = [load_predictor(Path(file)) for file in files]
        self.digest = hashlib.sha256(b"".join(x.file.read_bytes() for x in predictors)).hexdigest()
        self.predictors, self.specs = nn.ModuleList(predictors), {x.file: x.spec for x in predictors}

    def forward(self, images: Tensor) -> Tensor:
        # A softmax makes the means of log-probabilities sum to one again.
        return torch.stack([predictor.log_probabilities(images) for predictor in self.predictors]).mean(dim=0)  # type: ignore[union-attr, operator]


class SoftLabels:
    """Compute and cache the outputs of `teachers`, run folders or .pt files, for each epoch's augmented images.

    `seed` alone keys the augmentation, so that runs with other seeds find the same files in `folder`. A processor with
    AMX computes in bfloat16; its files, and those of a GPU, have other names, because their last bits differ.
    """

    def __init__(self, teachers: Sequence[NonEmptyStr], folder: NonEmptyStr, seed: Seed = 0) -> None:
        self.ensemble, self.folder, self.seed = Ensemble(teachers), Path(folder), seed

    def prepare_epoch(
        self, images: Tensor, augment: RandomAffine, spec: ImageSpec, epoch: int, progress: float
    ) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Load or compute an epoch's soft labels of all training images; `progress` is that when the epoch begins.

        Return a function from a batch's images and indices to augmented images and soft labels, [batch, classes].
        """
        for file, trained_on in self.ensemble.specs.items():
            if (trained_on.shape, trained_on.classes) != (spec.shape, spec.classes):
                reason = "was trained on images of another shape, or with other classes"
                raise UserError(f"data.soft_labels.teachers: {file} {reason}; name other teachers")
        # Drawn on the CPU, so that every device gets the same numbers.
        sample = [x.to(images.device) for x in augment.draw(len(images), make_generator(self.seed, epoch))]

        def augment_batch(batch: Tensor, indices: Tensor) -> Tensor:
            return augment.apply(batch.float(), [numbers[indices] for numbers in sample], progress)

        rounding = images.device.type, has_amx_bf16(), torch.backends.cudnn.allow_tf32
        settings = self.ensemble.digest, sorted(vars(augment).items()), spec.mean, spec.std, self.seed, epoch, progress
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
        except (UserError, AttributeError) as error:
            raise UserError(f"{file}: damaged ({error}); delete it and it is computed again") from error
        return lambda batch, indices: (augment_batch(batch, indices), log_probs[indices])

    def _compute(self, images: Tensor, augment_batch: Callable[[Tensor, Tensor], Tensor], spec: ImageSpec) -> Tensor:
        move_to_device(self.ensemble, images.device)
        outputs, use_bf16 = [], images.device.type == "cpu" and has_amx_bf16()
        batches = torch.arange(len(images), device=images.device).split(BATCH_SIZE)
        with torch.inference_mode():
            for indices in track(batches, "teacher outputs", transient=True, disable=not sys.stdout.isatty()):
                normalized = spec.normalize(augment_batch(images[indices], indices))
                with torch.autocast("cpu", torch.bfloat16, enabled=use_bf16):  # the networks alone
                    outputs.append(self.ensemble(normalized).float())
        return torch.cat(outputs)
