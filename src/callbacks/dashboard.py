"""What TensorBoard shows of a run beside its curves."""

import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from src.data.normalize import pixels

CURVES = {
    "training and validation": {
        "loss": ["Multiline", ["train/loss$", "val/loss$"]],
        "accuracy": ["Multiline", ["train/acc$", "val/acc$"]],
    }
}


@contextmanager
def _hook(layer: nn.Module, see: Any) -> Iterator[None]:
    handle = layer.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()


class Dashboard(Callback):
    """Fills the tabs of TensorBoard for a network of images; without its logger, or on other processes, does nothing.

    Once a run: curves of both stages in one chart, the graph, the config, the layers, a batch as augmented. Every
    `log_every_n_steps`: the gradient's norm before clipping. Once an epoch: histograms of the weights, and of the
    activations on the first `watched` images of the run; the first layer's filters. After the test: the confusion
    matrix, precision-recall curves, the worst mistakes, and the last layer's inputs for the first `embedded` images.
    """

    def __init__(self, watched: int = 32, embedded: int = 1000) -> None:
        self.watched, self.embedded = watched, embedded
        self.images: Tensor | None = None

    def _writer(self, trainer: L.Trainer) -> SummaryWriter | None:
        found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        return found[0].experiment if found and trainer.is_global_zero else None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (writer := self._writer(trainer)):
            return
        writer.add_custom_scalars(CURVES)
        # A copy, because the trace of a network in training would move its running averages.
        net = deepcopy(cast(nn.Module, pl_module.net)).cpu().float().eval()
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # add_graph's own way is deprecated
            writer.add_graph(net, cast(Tensor, pl_module.example_input_array).cpu())
        folder = Path(trainer.default_root_dir)
        for tag, file in {"config": folder / ".hydra/config.yaml", "layers": folder / "layers.txt"}.items():
            if file.is_file():
                writer.add_text(tag, "\n".join(f"    {line}" for line in file.read_text().splitlines()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> None:
        if self.images is None and (writer := self._writer(trainer)):
            self.images = batch[0][: self.watched]
            writer.add_image("batch as augmented", make_grid(pixels(batch[0][:64])), trainer.global_step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps or not (writer := self._writer(trainer)):  # type: ignore[attr-defined]
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        writer.add_scalar("gradient norm", nn.utils.get_total_norm(gradients), trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (writer := self._writer(trainer)):
            return
        net, step = cast(nn.Module, pl_module.net), trainer.global_step
        for name, parameter in net.named_parameters():
            writer.add_histogram(f"weights/{name}", parameter, step)
        filters = next(layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d))
        picture = make_grid(filters.detach()[:, :1], nrow=8, padding=1, normalize=True, scale_each=True)
        writer.add_image("first layer", nn.functional.interpolate(picture[None], scale_factor=16)[0], step)

        def see(name: str) -> Any:
            return lambda _layer, _inputs, output: writer.add_histogram(f"activations/{name}", output, step)

        net.eval()
        with ExitStack() as hooks, torch.no_grad():
            for name, layer in net.named_modules():
                if isinstance(layer, nn.ReLU):
                    hooks.enter_context(_hook(layer, see(name)))
            net(self.images)
        net.train()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.hooks = ExitStack()
        self.seen: dict[str, list[Tensor]] = {"images": [], "labels": [], "outputs": [], "features": []}
        # Of several processes each tests a share, and a part of a confusion matrix would mislead.
        if not self._writer(trainer) or trainer.world_size > 1:
            return
        last = [layer for layer in pl_module.modules() if isinstance(layer, nn.Linear)][-1]
        self.hooks.enter_context(_hook(last, lambda _, inputs, output: self.seen["features"].append(inputs[0])))
        self.hooks.enter_context(_hook(pl_module, lambda _, inputs, output: self.seen["outputs"].append(output)))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: tuple[Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.seen["images"].append(pixels(batch[0]))
        self.seen["labels"].append(batch[1])

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from src.pictures import confusion, mistakes  # here, because they bring matplotlib

        self.hooks.close()
        writer = self._writer(trainer)
        if not writer or not self.seen["outputs"]:
            return
        images, labels, outputs, features = (torch.cat(parts).cpu() for parts in self.seen.values())
        probabilities, step = outputs.float().exp(), trainer.global_step
        writer.add_figure("test/confusion", confusion(labels, probabilities), step)
        worst = mistakes(images[:, 0], labels, probabilities)
        if worst:
            writer.add_figure("test/worst mistakes", worst, step)
        for digit in range(probabilities.shape[1]):
            writer.add_pr_curve(f"test/digit {digit}", labels == digit, probabilities[:, digit], step)
        few = slice(self.embedded)
        pairs = torch.stack([labels, probabilities.argmax(1)], 1)[few].tolist()
        writer.add_embedding(
            features[few].float(), pairs, images[few] / 255, step, tag="test", metadata_header=["digit", "read as"]
        )
