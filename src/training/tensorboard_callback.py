"""A callback that fills TensorBoard's tabs: charts, the graph, histograms, images, plots of the test."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from src.models.classifier import Classifier

CHARTS = {
    "loss": ["Multiline", ["train/loss$", "val/loss$"]],
    "accuracy": ["Multiline", ["train/acc %$", "val/acc %$"]],
}


@contextmanager
def _warn_on_error(name: str) -> Iterator[None]:
    """Turn any error into a warning: a plot costs no run."""
    try:
        yield
    except Exception as error:
        warnings.warn(f"TensorBoard lacks {name} ({type(error).__name__}: {error})", stacklevel=1)


class TensorBoardCallback(Callback):
    """Fill the tabs of TensorBoard. The graph is that of a Classifier, the batch that of images."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self.writer: Any = writers[0] if writers and trainer.is_global_zero else None
        self.spec: Any = getattr(trainer.datamodule, "spec", None) if self.writer else None  # of a batch to plot
        self.tested: list[tuple[Tensor, Tensor, Tensor]] = []  # images, labels, log-probabilities

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.writer:
            return
        self.writer.add_custom_scalars({"training and validation": CHARTS})
        if isinstance(pl_module, Classifier) and isinstance(pl_module.example_input_array, Tensor):
            with _warn_on_error("the graph"), warnings.catch_warnings(action="ignore"):
                # Of a copy, because tracing a network in training mode would change its running averages.
                net, example = deepcopy(pl_module.net).cpu().float().eval(), pl_module.example_input_array.cpu().float()
                self.writer.add_graph(net, example)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if spec := self.spec:
            self.spec = None
            with _warn_on_error("the augmented batch"):
                is_indices = isinstance(batch, Tensor)  # for a CUDA graph
                images = (trainer.datamodule.make_batch(batch) if is_indices else batch)[0]
                grid = make_grid(spec.denormalize(images[:64]))
                self.writer.add_image("train/augmented batch", grid, trainer.global_step)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if self.writer:
            with _warn_on_error("histograms and filters"):
                net, step = getattr(pl_module, "net", pl_module), trainer.global_step - 1  # a resume drops later steps
                for name, parameter in net.named_parameters():
                    self.writer.add_histogram(f"weights/{name}", parameter, step)
                for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)][:1]:
                    kernels = make_grid(layer.weight.detach()[:64, :1], padding=1, normalize=True, scale_each=True)
                    enlarged = nn.functional.interpolate(kernels[None], scale_factor=16)[0]
                    self.writer.add_image("weights/conv1 filters", enlarged, step)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        # Each of several processes tests only a part.
        is_classifier = isinstance(pl_module, Classifier) and isinstance(outputs, Tensor)
        if self.spec and is_classifier and trainer.world_size == 1:
            self.tested.append((self.spec.denormalize(batch[0]).cpu(), batch[1].cpu(), outputs.float().cpu()))

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.tested:
            return
        with _warn_on_error("the plots of the test"):
            from src.training.plots import plot_confusion_matrix, plot_mistakes  # matplotlib is slow to import

            images, labels, log_probabilities = (torch.cat(parts) for parts in zip(*self.tested, strict=True))
            arguments = labels, log_probabilities.exp(), self.spec.classes
            self.writer.add_figure("test/confusion matrix", plot_confusion_matrix(*arguments), trainer.global_step)
            if figure := plot_mistakes(images, *arguments):
                self.writer.add_figure("test/worst mistakes", figure, trainer.global_step)
