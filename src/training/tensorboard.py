"""TensorBoard: accuracies in percent, and a callback that fills the other tabs."""

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torchvision.utils import make_grid

CHARTS = {
    "loss": ["Multiline", ["train/loss$", "val/loss$"]],
    "accuracy": ["Multiline", ["train/acc %$", "val/acc %$"]],
}
ACTIVATIONS = nn.ReLU, nn.GELU, nn.SiLU
ACTIVATION_IMAGES, PROJECTOR_IMAGES, PR_CURVES = 32, 1000, 10


class PercentTensorBoardLogger(TensorBoardLogger):
    """Log accuracies in percent, and no curve of epoch numbers."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        percent = {f"{name} %": 100 * value for name, value in metrics.items() if name.endswith("/acc")}
        others = {name: value for name, value in metrics.items() if not name.endswith(("/acc", "epoch"))}
        super().log_metrics(percent | others, step)

    @rank_zero_only
    def save(self) -> None:
        if self.hparams:  # Lightning saves before they are recorded, and writes hparams.yaml only once
            super().save()


@contextmanager
def _warn_on_failure(plot: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # no run should end because of a plot
        warnings.warn(f"TensorBoard lacks {plot} ({str(error).splitlines()[0]})", stacklevel=1)


def _record(layers: Iterable[tuple[str, nn.Module]], hooks: ExitStack) -> dict[str, list[Any]]:
    """Record the first argument and the output of every call of the layers, by name, until `hooks` are closed."""
    calls = defaultdict(list)

    def append(name: str, _layer: nn.Module, inputs: Any, output: Tensor) -> None:
        calls[name].append((inputs[0], output))

    for name, layer in layers:
        hooks.enter_context(layer.register_forward_hook(partial(append, name)))
    return calls


class TensorBoardCallback(Callback):
    """Fill the tabs of TensorBoard if its logger is used; a plot that fails becomes a warning."""

    images: Tensor | None = None  # on which activations are logged

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self.writer: Any = writers[0] if writers and trainer.is_global_zero else None
        self.spec: Any = getattr(trainer.datamodule, "spec", None) if self.writer else None  # describes images

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if not self.writer:
            return
        self.writer.add_custom_scalars({"training and validation": CHARTS})
        for tag, name in {"config": ".hydra/config.yaml", "layers": "layers.txt"}.items():
            if (file := Path(trainer.default_root_dir, name)).is_file():
                self.writer.add_text(tag, indent(file.read_text(), "    "))
        if isinstance(example := pl_module.example_input_array, Tensor) and hasattr(pl_module, "net"):
            with _warn_on_failure("the graph"), warnings.catch_warnings(action="ignore"):
                # Of a copy, because tracing a network in training mode would change its running averages.
                self.writer.add_graph(deepcopy(pl_module.net).cpu().float().eval(), example.cpu())

    @_warn_on_failure("the augmented batch")
    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.spec and self.images is None:
            is_indices = isinstance(batch, Tensor)  # for a CUDA graph
            images = (trainer.datamodule.make_batch(batch) if is_indices else batch)[0]
            self.images = images[:ACTIVATION_IMAGES]
            self.writer.add_image("augmented batch", make_grid(self.spec.denormalize(images[:64])), trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.writer and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
            self.writer.add_scalar("gradient norm", nn.utils.get_total_norm(gradients), trainer.global_step)

    @_warn_on_failure("histograms and filters")
    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        net, step = getattr(pl_module, "net", pl_module), trainer.global_step - 1  # a resume drops later steps
        for name, parameter in net.named_parameters() if self.writer else ():
            self.writer.add_histogram(f"weights/{name}", parameter, step)
        if self.images is None:
            return
        for layer in [layer for layer in net.modules() if isinstance(layer, nn.Conv2d)][:1]:
            filters = layer.weight.detach()[:64, : 3 if layer.in_channels == 3 else 1]
            grid = make_grid(filters, padding=1, normalize=True, scale_each=True)
            self.writer.add_image("conv1 filters", nn.functional.interpolate(grid[None], scale_factor=16)[0], step)
        with ExitStack() as stack, torch.no_grad():
            for layer in net.modules():
                stack.callback(setattr, layer, "training", layer.training)  # frozen layers stay in evaluation mode
            layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, ACTIVATIONS)]
            calls = _record(layers, stack)
            net.eval()(self.images)
        for name, ((_, output),) in calls.items():
            self.writer.add_histogram(f"activations/{name}", output, step)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.hooks, self.labels = ExitStack(), list[Tensor]()
        layers = [("features", layer) for layer in pl_module.modules() if isinstance(layer, nn.Linear)][-1:]
        is_plotted = self.spec and trainer.world_size == 1  # each of several processes tests only a part
        self.calls = _record([("module", pl_module), *layers] if is_plotted else [], self.hooks)

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.labels += [batch[1]] if self.calls else []

    @_warn_on_failure("the plots of the test")
    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.hooks.close()
        if not self.calls.get("module"):
            return
        from matplotlib import color_sequences  # slow to import

        from src.training.plots import plot_confusion_matrix, plot_mistakes

        images, outputs = (torch.cat(parts).cpu() for parts in zip(*self.calls["module"], strict=True))
        images, labels = self.spec.denormalize(images), torch.cat(self.labels).cpu()
        probabilities, classes, step = outputs.float().exp(), self.spec.classes, trainer.global_step
        self.writer.add_figure("test/confusion matrix", plot_confusion_matrix(labels, probabilities, classes), step)
        if figure := plot_mistakes(images, labels, probabilities, classes):
            self.writer.add_figure("test/worst mistakes", figure, step)
        predicted = probabilities.argmax(1)
        mistakes = labels[predicted != labels].bincount(minlength=len(classes))
        for label in mistakes.topk(min(PR_CURVES, len(classes))).indices.tolist():
            tag = f"test/{self.spec.label_name} {classes[label]}"
            self.writer.add_pr_curve(tag, labels == label, probabilities[:, label], step)
        if "features" in self.calls:
            features = torch.cat([inputs for inputs, _ in self.calls["features"]])[:PROJECTOR_IMAGES].float()
            images, labels = images[: len(features)] / 255, labels[: len(features)]
            if images.shape[1] == 1:  # colour them by their class, as the projector itself does not
                images = images * torch.tensor(color_sequences["tab10"])[labels % 10][:, :, None, None]
            metadata = [[classes[i], classes[j]] for i, j in zip(labels, predicted, strict=False)]
            header = [self.spec.label_name, "predicted as"]
            self.writer.add_embedding(features, metadata, images, step, "test", header)
