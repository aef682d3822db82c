"""A callback that fills TensorBoard's tabs: the graph, histograms, images, plots of the test."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchvision.utils import make_grid

from src.models.classifier import Classifier

CHARTS = {
    name: ["Multiline", [f"train/{tag}$", f"val/{tag}$"]] for name, tag in [("loss", "loss"), ("accuracy", "acc %")]
}


def _plot(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a hook if TensorBoard's logger is used; when it fails, warn once and leave it out: it costs no run."""

    def decorate(hook: Callable[..., None]) -> Callable[..., None]:
        @wraps(hook)
        def run(self: "TensorBoardCallback", *arguments: Any) -> None:
            if self.writer and name not in self.failed:
                try:
                    hook(self, *arguments)
                except Exception as error:
                    self.failed.add(name)
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    warnings.warn(f"TensorBoard lacks {name} ({reason})", stacklevel=1)

        return run

    return decorate


class TensorBoardCallback(Callback):
    """Fill the tabs of TensorBoard. Plots of predictions are for Classifier and its subclasses alone."""

    is_batch_plotted = False

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self.writer: Any = writers[0] if writers and trainer.is_global_zero else None
        self.spec: Any = getattr(trainer.datamodule, "spec", None) if self.writer else None  # describes images
        self.failed = set[str]()
        self.tested: list[tuple[Tensor, Tensor, Tensor]] = []  # images, labels, log-probabilities

    @_plot("the graph")
    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.writer.add_custom_scalars({"training and validation": CHARTS})
        example = pl_module.example_input_array
        if isinstance(pl_module, Classifier) and isinstance(example, Tensor):
            with warnings.catch_warnings(action="ignore"):
                # Of a copy, because tracing a network in training mode would change its running averages.
                self.writer.add_graph(deepcopy(pl_module.net).cpu().float().eval(), example.cpu().float())

    @_plot("the augmented batch")
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.spec and not self.is_batch_plotted:
            self.is_batch_plotted = True
            is_indices = isinstance(batch, Tensor)  # for a CUDA graph
            images = (trainer.datamodule.make_batch(batch) if is_indices else batch)[0]
            grid = make_grid(self.spec.denormalize(images[:64]))
            self.writer.add_image("train/augmented batch", grid, trainer.global_step)

    @_plot("the gradient norm")
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self.writer.add_scalar("train/gradient norm", nn.utils.get_total_norm(gradients), trainer.global_step)

    @_plot("histograms and filters")
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        net, step = getattr(pl_module, "net", pl_module), trainer.global_step - 1  # a resume drops later steps
        for name, parameter in net.named_parameters():
            self.writer.add_histogram(f"weights/{name}", parameter, step)
        for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)][:1]:
            filters = layer.weight.detach()[:64, : 3 if layer.in_channels == 3 else 1]
            grid = make_grid(filters, padding=1, normalize=True, scale_each=True)
            enlarged = nn.functional.interpolate(grid[None], scale_factor=16)[0]
            self.writer.add_image("weights/conv1 filters", enlarged, step)

    @_plot("the plots of the test")
    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        # Each of several processes tests only a part.
        is_plotted = isinstance(pl_module, Classifier) and isinstance(outputs, Tensor) and trainer.world_size == 1
        if self.spec and is_plotted:
            self.tested.append((self.spec.denormalize(batch[0]).cpu(), batch[1].cpu(), outputs.float().cpu()))

    @_plot("the plots of the test")
    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        if not self.tested:
            return
        from src.training.plots import plot_confusion_matrix, plot_mistakes  # matplotlib is slow to import

        images, labels, log_probabilities = (torch.cat(parts) for parts in zip(*self.tested, strict=True))
        probabilities, classes, step = log_probabilities.exp(), self.spec.classes, trainer.global_step
        self.writer.add_figure("test/confusion matrix", plot_confusion_matrix(labels, probabilities, classes), step)
        if figure := plot_mistakes(images, labels, probabilities, classes):
            self.writer.add_figure("test/worst mistakes", figure, step)
