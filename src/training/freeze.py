"""Freeze parameters for fine-tuning."""

from textwrap import shorten

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import nn

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, PositiveInt
from src.optim.configure import compile_layer_pattern


class FreezeParameters(Callback):
    """Freeze the layers that a regular expression names: for the first `epochs`, or always if None.

    Batch norms that match stay in evaluation mode. Unlike Lightning's BaseFinetuning, which adds parameters to the
    optimizer when it unfreezes them, this suits schedulers of all steps and exact resume: the optimizer has all
    parameters from the start, and skips those without gradients. Raises UserError if no or every parameter matches.
    """

    def __init__(self, pattern: NonEmptyStr, epochs: PositiveInt | None = None) -> None:
        self.pattern, self.epochs = compile_layer_pattern(pattern), epochs
        self.parameters: list[nn.Parameter] = []
        self.batch_norms: list[nn.Module] = []

    # Not in setup: DistributedDataParallel would never synchronize what is frozen when it wraps the module.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = {name: parameter for name, parameter in pl_module.named_parameters() if parameter.requires_grad}
        self.parameters = [parameter for name, parameter in named.items() if self.pattern.fullmatch(name)]
        if len(self.parameters) in (0, len(named)):
            count, names = "all" if self.parameters else "none", shorten(", ".join(named), 200)
            raise UserError(f"callbacks.freeze.pattern: matches {count} of {names}; (?!.*fc).* is all but fc")
        norms = {name: layer for name, layer in pl_module.named_modules() if hasattr(layer, "running_mean")}
        matched = [layer for name, layer in norms.items() if self.pattern.fullmatch(f"{name}.running_mean")]
        self.batch_norms = [layer for layer in matched if layer.training]
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        is_frozen = self.epochs is None or trainer.current_epoch < self.epochs
        for parameter in self.parameters:
            parameter.requires_grad_(not is_frozen)
        for layer in self.batch_norms:
            layer.train(not is_frozen)
