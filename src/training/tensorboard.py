"""What TensorBoard shows of a run beside its curves."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torchvision.utils import make_grid

from src.core.value_types import PositiveInt
from src.data.image_spec import ImageSpec

CURVES = {
    "training and validation": {
        "loss": ["Multiline", ["train/loss$", "val/loss$"]],
        "accuracy": ["Multiline", ["train/acc %$", "val/acc %$"]],
    }
}


def format_tag(name: str) -> str:
    """What TensorBoard calls a metric: accuracies are shown in percent."""
    return f"{name} %" if name.endswith("/acc") else name


class PercentTensorBoardLogger(TensorBoardLogger):
    """Lightning's, with accuracies in percent, and without a curve that says which epoch each step was of."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        kept = {name: value for name, value in metrics.items() if name != "epoch"}
        super().log_metrics(
            {format_tag(name): value * (100 if format_tag(name) != name else 1) for name, value in kept.items()}, step
        )

    @rank_zero_only
    def save(self) -> None:
        if self.hparams:  # none before the training, when Lightning saves too: a start that fails leaves nothing
            super().save()


@contextmanager
def _hook(layer: nn.Module, see: Any) -> Iterator[None]:
    handle = layer.register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()


class TensorBoardCallback(Callback):
    """Fills the tabs of TensorBoard; without its logger, or on other processes, does nothing.

    Once a run: curves of both stages in one chart, the graph, the config, the layers. Every `log_every_n_steps`: the
    gradient's norm before clipping. Once an epoch: histograms of the weights. Of a network of images whose data module
    has a `spec`: a batch as augmented, the activations behind each ReLU on the first `watched` images of the run, the
    first convolution's filters. After its test: the confusion matrix, the worst mistakes, precision-recall curves of
    the `curves` classes with most mistakes, and the last linear layer's inputs for the first `embedded` images.
    """

    def __init__(self, watched: PositiveInt = 32, embedded: PositiveInt = 1000, curves: PositiveInt = 10) -> None:
        self.watched, self.embedded, self.curves = watched, embedded, curves
        self.images: Tensor | None = None

    def _writer(self, trainer: L.Trainer) -> SummaryWriter | None:
        found = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        return found[0].experiment if found and trainer.is_global_zero else None

    def _spec(self, trainer: L.Trainer) -> ImageSpec | None:
        return getattr(trainer.datamodule, "spec", None)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (writer := self._writer(trainer)):
            return
        writer.add_custom_scalars(CURVES)
        example = pl_module.example_input_array
        if isinstance(example, Tensor) and isinstance(own := getattr(pl_module, "net", None), nn.Module):
            # A copy, because the trace of a network in training would move its running averages.
            with warnings.catch_warnings(action="ignore"):  # add_graph's own way is deprecated; tracers warn of much
                try:
                    writer.add_graph(deepcopy(own).cpu().float().eval(), example.cpu())
                except Exception as error:  # what cannot be copied or traced can be trained all the same
                    print(f"warning: no graph in TensorBoard: {str(error).splitlines()[0]}", file=sys.stderr)
        folder = Path(trainer.default_root_dir)
        for tag, file in {"config": folder / ".hydra/config.yaml", "layers": folder / "layers.txt"}.items():
            if file.is_file():
                writer.add_text(tag, "\n".join(f"    {line}" for line in file.read_text().splitlines()))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.images is None and (writer := self._writer(trainer)) and (spec := self._spec(trainer)):
            images = (trainer.datamodule.make_batch(batch) if isinstance(batch, Tensor) else batch)[0]  # type: ignore[attr-defined]
            self.images = images[: self.watched]
            writer.add_image("batch as augmented", make_grid(spec.denormalize(images[:64])), trainer.global_step)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps or not (writer := self._writer(trainer)):  # type: ignore[attr-defined]
            return
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        writer.add_scalar("gradient norm", nn.utils.get_total_norm(gradients), trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (writer := self._writer(trainer)):
            return
        net, step = cast(nn.Module, getattr(pl_module, "net", pl_module)), trainer.global_step
        for name, parameter in net.named_parameters():
            writer.add_histogram(f"weights/{name}", parameter, step)
        if self.images is None:
            return
        filters = next((layer.weight for layer in net.modules() if isinstance(layer, nn.Conv2d)), None)
        if filters is not None:
            shown = filters.detach()[:64, :3] if filters.shape[1] == 3 else filters.detach()[:64, :1]
            picture = make_grid(shown, nrow=8, padding=1, normalize=True, scale_each=True)
            writer.add_image("first layer", nn.functional.interpolate(picture[None], scale_factor=16)[0], step)

        def see(name: str) -> Any:
            return lambda _layer, _inputs, output: writer.add_histogram(f"watched activations/{name}", output, step)

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
        if not self._writer(trainer) or not self._spec(trainer) or trainer.world_size > 1:
            return
        last = [layer for layer in pl_module.modules() if isinstance(layer, nn.Linear)][-1:]
        for layer in last:
            self.hooks.enter_context(_hook(layer, lambda _, inputs, output: self.seen["features"].append(inputs[0])))
        self.hooks.enter_context(_hook(pl_module, lambda _, inputs, output: self.seen["outputs"].append(output)))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if spec := self._spec(trainer):
            self.seen["images"].append(spec.denormalize(batch[0]))
            self.seen["labels"].append(batch[1])

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        import matplotlib  # here, because it takes long

        from src.training.plots import plot_confusion_matrix, plot_mistakes

        self.hooks.close()
        writer, spec = self._writer(trainer), self._spec(trainer)
        if not writer or not spec or not self.seen["outputs"]:
            return
        found = {name: torch.cat(parts).cpu() for name, parts in self.seen.items() if parts}
        images, labels, probabilities = found["images"], found["labels"], found["outputs"].float().exp()
        step, classes, read = trainer.global_step, spec.classes, probabilities.argmax(1)
        writer.add_figure("test/confusion", plot_confusion_matrix(labels, probabilities, classes), step)
        worst = plot_mistakes(images, labels, probabilities, classes)
        if worst:
            writer.add_figure("test/worst mistakes", worst, step)
        wrong = torch.bincount(labels[read != labels], minlength=len(classes))
        for label in wrong.argsort(descending=True, stable=True)[: self.curves].sort().values.tolist():
            tag = f"test/{spec.label_name} {classes[label]}"
            writer.add_pr_curve(tag, labels == label, probabilities[:, label], step)
        if "features" in found and found["features"].ndim == 2:
            few = slice(self.embedded)
            pairs = [[classes[label], classes[other]] for label, other in zip(labels[few], read[few], strict=True)]
            shown = images[few] / 255
            if shown.shape[1] == 1:  # grey ones are coloured by their class, as the projector itself does not
                colours = torch.tensor(matplotlib.color_sequences["tab10"])[labels[few] % 10]
                shown = shown * colours[:, :, None, None]
            features = found["features"][few].float()
            writer.add_embedding(features, pairs, shown, step, tag="test", metadata_header=[spec.label_name, "read as"])
