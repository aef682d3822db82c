"""Training and scoring of any network that maps images to log-probabilities."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, nll_loss
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from src.core.errors import UserError
from src.core.value_types import PositiveFloat, Probability, UnitInterval
from src.optim.configure import configure_optimizers


def are_log_probabilities(outputs: Tensor, classes: int | None = None) -> bool:
    """Whether these are log-probabilities, and no logits. Raises UserError for anything else than [N, classes]."""
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or (classes and outputs.shape[1] != classes):
        raise UserError(f"model gives {shape} where [images, {classes or 'classes'}] logits are needed")
    values = outputs.detach().float()
    one = torch.ones_like(values[:, 0])
    if values.min() >= 0 and torch.allclose(values.sum(1), one, atol=1e-3):
        raise UserError("model gives probabilities; let it give logits, or log-probabilities")
    return torch.allclose(values.logsumexp(1), 0 * one, atol=1e-2)


def move_to_device(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, moved there, in a memory layout that the device is right in.

    On mps, PyTorch before 2.15 gets convolutions and batch norm wrong in channels_last (pytorch#192212, #175189).
    """
    return net.to(device, memory_format=torch.contiguous_format) if device.type == "mps" else net.to(device)  # type: ignore[call-overload]


class LossAndAccuracy(Metric):
    """Mean loss and accuracy over images. torchmetrics' own two take four times as long, 1 % of a step on a CPU."""

    loss: Tensor
    right: Tensor
    images: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in "loss", "right", "images":
            self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda state: fn(state).to(state.dtype), exclude_state)  # the sums outgrow a bf16 network

    def update(self, loss: Tensor, log_probabilities: Tensor, labels: Tensor) -> None:
        """Of a batch of N images: its mean loss, [N, classes], [N]."""
        self.loss.add_(loss.detach(), alpha=len(labels))
        self.right.add_((log_probabilities.detach().argmax(1) == labels).sum())
        self.images.add_(len(labels))

    def compute(self) -> dict[str, Tensor]:
        return {"loss": self.loss / self.images, "acc": self.right / self.images}


class Classifier(L.LightningModule):
    """Negative log-likelihood and accuracy (a fraction) of `net`, logged once an epoch for each stage.

    `net` maps images to logits or to log-probabilities, [N, classes]: which, its first outputs tell. It learns from
    labels of which `label_smoothing` is spread over all classes, and with a share of `distill_weight` from a teacher's
    log-probabilities where the batches have them as their third part, both made softer by `temperature`
    (https://arxiv.org/abs/1503.02531). The scores are those of the labels alone.
    `optimizer` and `scheduler` await their parameters, see src.optim.configure. Raises UserError for outputs that are
    neither.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        label_smoothing: Probability = 0.0,
        temperature: PositiveFloat = 4.0,
        distill_weight: UnitInterval = 0.9,
    ) -> None:
        super().__init__()
        self.label_smoothing, self.temperature, self.distill_weight = label_smoothing, temperature, distill_weight
        self.net = net
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.classes: int | None = None
        self.logits: bool | None = None  # whether that is what the network gives; None: not yet known
        self.train_scores, self.val_scores, self.test_scores = LossAndAccuracy(), LossAndAccuracy(), LossAndAccuracy()

    def setup(self, stage: str) -> None:
        move_to_device(self.net, self.trainer.strategy.root_device)
        spec = getattr(getattr(self.trainer, "datamodule", None), "spec", None)
        if spec:
            self.classes = len(spec.classes)
            if self.example_input_array is None:
                self.example_input_array = torch.zeros(1, *spec.shape)

    def forward(self, images: Tensor) -> Tensor:
        """[N, C, H, W] normalised images to [N, classes] log-probabilities."""
        outputs = self.net(images)
        if self.logits is None:
            self.logits = not are_log_probabilities(outputs, self.classes)
        return outputs.log_softmax(dim=1) if self.logits else outputs

    def predict_step(self, batch: tuple[Tensor, ...] | Tensor, batch_idx: int) -> Tensor:
        return self(batch if isinstance(batch, Tensor) else batch[0])

    def _step(self, batch: tuple[Tensor, ...], scores: LossAndAccuracy) -> Tensor:
        images, labels, *answers = batch
        if labels.is_floating_point():
            raise UserError("task: Classifier learns classes, and the data has none; set another data= or model=")
        log_probabilities = self(images)
        loss = nll_loss(log_probabilities, labels)
        scores.update(loss, log_probabilities, labels)
        if self.label_smoothing:
            loss = (1 - self.label_smoothing) * loss - self.label_smoothing * log_probabilities.mean()
        if answers:
            loss = (1 - self.distill_weight) * loss + self.distill_weight * self._distillation(
                answers[0], log_probabilities
            )
        return loss

    def _distillation(self, taught: Tensor, learned: Tensor) -> Tensor:
        """The divergence at `temperature`, times its square, so that the gradients do not fade with it."""
        taught, learned = ((each.float() / self.temperature).log_softmax(dim=1) for each in (taught, learned))
        return self.temperature**2 * kl_div(learned, taught, log_target=True, reduction="batchmean")

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self._step(batch, self.train_scores)
        # Lightning's log() costs the same whether or not the step is written, so it is called only then.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss_step", loss.detach())
        return loss

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._step(batch, self.val_scores)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        self._step(batch, self.test_scores)

    def _share_buffers(self) -> None:
        """Each process has the running statistics of its own batches; those of the first are scored and saved."""
        if self.trainer.world_size > 1:  # type: ignore[attr-defined]
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, 0)

    def on_validation_start(self) -> None:
        self._share_buffers()

    def on_test_start(self) -> None:
        self._share_buffers()

    def _log_epoch(self, stage: str, scores: LossAndAccuracy) -> None:
        values = {f"{stage}/{name}": value for name, value in scores.compute().items()}
        self.log_dict(values, prog_bar=stage != "test")
        scores.reset()

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train", self.train_scores)

    def on_validation_epoch_end(self) -> None:
        self._log_epoch("val", self.val_scores)

    def on_test_epoch_end(self) -> None:
        self._log_epoch("test", self.test_scores)

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.optimizer, self.scheduler)
