"""The LightningModule that trains and scores any image classifier."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partialmethod
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric, MetricCollection

from src.core.errors import UserError
from src.core.value_types import PositiveFloat, Probability, UnitInterval
from src.optim.configure import configure_optimizers


def check_outputs(outputs: Any, classes: int) -> None:
    """Raise UserError unless a network's outputs may be logits or log-probabilities, [images, classes]."""
    shape = tuple(getattr(outputs, "shape", ()))
    if len(shape) != 2 or shape[1] != classes:
        raise UserError(f"model: returns {shape or type(outputs).__name__}; it must return logits, [images, {classes}]")
    if outputs.min() >= 0 and ((outputs.sum(1) - 1).abs() < 1e-3).all():
        raise UserError("model: returns probabilities; it must return logits or log-probabilities")


class LossAndAccuracy(Metric):
    """Mean loss and accuracy over images, in a quarter of the time of torchmetrics' two: 1% of a step on a CPU."""

    loss_sum: Tensor
    correct_count: Tensor
    image_count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in "loss_sum", "correct_count", "image_count":
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        # A bfloat16 network moves its metrics as well, but sums outgrow that type.
        return super()._apply(lambda state: fn(state).to(state.dtype), exclude_state)

    def update(self, loss: Tensor, log_probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch: its mean loss, [N, classes] log-probabilities and [N] labels."""
        self.loss_sum.add_(loss.detach(), alpha=len(labels))
        self.correct_count.add_((log_probabilities.detach().argmax(1) == labels).sum())
        self.image_count.add_(len(labels))

    def compute(self) -> dict[str, Tensor]:
        """Return the loss and the accuracy, a fraction."""
        return {"loss": self.loss_sum / self.image_count, "acc": self.correct_count / self.image_count}


class Classifier(L.LightningModule):
    """Train `net`, which maps images to logits or log-probabilities; log loss and accuracy, a fraction, once per epoch.

    Loss = (1 − w) · label-smoothed NLL + w · T² · KL(teacher ‖ student), both softened: softmax(log-probabilities / T),
    with w = `distill_weight`, T = `temperature` (https://arxiv.org/abs/1503.02531); w = 0 for batches without soft
    labels. The loss that is logged is the NLL of the labels alone. `loss`, of log-probabilities and labels, replaces
    the NLL. `metrics` of probabilities and labels are logged with the validation and the test, one value per class if
    they return several. `optimizer` and `scheduler` are partial; see src.optim.configure.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        label_smoothing: Probability = 0.0,
        temperature: PositiveFloat = 4.0,
        distill_weight: UnitInterval = 0.9,
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        metrics: Mapping[str, Metric] | None = None,
    ) -> None:
        super().__init__()
        self.net, self.optimizer, self.scheduler = net, optimizer, scheduler
        self.label_smoothing, self.temperature, self.distill_weight = label_smoothing, temperature, distill_weight
        self.loss: Callable[[Tensor, Tensor], Tensor] = loss or nll_loss
        self.classes: Sequence[str] = ()
        self.train_metric, self.val_metric, self.test_metric = LossAndAccuracy(), LossAndAccuracy(), LossAndAccuracy()
        extra = MetricCollection(dict(metrics or {}), compute_groups=False)
        self.extra_metrics: Any = nn.ModuleDict({stage: extra.clone() for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        spec = getattr(getattr(self.trainer, "datamodule", None), "spec", None)
        if spec:
            self.classes, self.example_input_array = spec.classes, torch.zeros(1, *spec.shape)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).log_softmax(dim=1)  # which leaves log-probabilities as they are

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def shared_step(self, batch: Any, stage: str) -> tuple[Tensor, Tensor]:
        """Update the metrics of the stage; return the loss of the labels alone and [N, classes] log-probabilities."""
        images, labels = batch[0], batch[1]
        log_probabilities = self(images)
        loss = self.loss(log_probabilities, labels)
        getattr(self, f"{stage}_metric").update(loss, log_probabilities, labels)
        if stage in self.extra_metrics:
            self.extra_metrics[stage].update(log_probabilities.exp(), labels)
        return loss, log_probabilities

    def compute_training_loss(self, batch: Any) -> Tensor:
        """Return the training loss of (images, labels) or (images, labels, teacher log-probabilities)."""
        loss, log_probabilities = self.shared_step(batch, "train")
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * log_probabilities.mean()
        _, _, *teacher_log_probs = batch
        if teacher_log_probs:
            outputs = log_probabilities, *teacher_log_probs
            student, teacher = ((x.float() / self.temperature).log_softmax(dim=1) for x in outputs)
            divergence = self.temperature**2 * kl_div(student, teacher, log_target=True, reduction="batchmean")
            loss = (1 - self.distill_weight) * loss + self.distill_weight * divergence
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.compute_training_loss(batch)
        # Lightning's log() takes the same time whether or not the step is written, so it is called only then.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss_step", loss.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.shared_step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.shared_step(batch, "test")[1]

    def on_validation_start(self) -> None:
        if self.trainer.world_size > 1:  # type: ignore[attr-defined]  # score and save the first process's batch norm
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _log_epoch(self, stage: str) -> None:
        extra = [self.extra_metrics[stage]] if stage in self.extra_metrics else []
        for metric in getattr(self, f"{stage}_metric"), *extra:
            for name, value in metric.compute().items():
                if value.ndim:  # one value per class
                    labels = self.classes or range(len(value))
                    self.log_dict({f"{stage}/{name}/{label}": x for label, x in zip(labels, value, strict=True)})
                else:
                    self.log(f"{stage}/{name}", value, prog_bar=stage != "test")
            metric.reset()

    on_test_start = on_validation_start
    on_train_epoch_end = partialmethod(_log_epoch, "train")
    on_validation_epoch_end = partialmethod(_log_epoch, "val")
    on_test_epoch_end = partialmethod(_log_epoch, "test")

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)
