"""Train with one CUDA graph per step: python -m src.train trainer=cuda_graph."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor

from src.core.compat import set_closure_loss
from src.core.errors import UserError

EAGER_STEPS = 3  # per epoch, in which PyTorch and the optimizer allocate what a graph cannot


class CUDAGraphStrategy(SingleDeviceStrategy):
    """Capture augmentation, forward and backward pass, clipping and the optimizer step, and replay them.

    The first steps of an epoch, logged steps and batches of another size run eagerly, and only they call hooks within a
    step. Each epoch is captured anew, because metrics are reset. Raises UserError for what a graph cannot do.
    """

    wants_indices = True  # a graph makes the batch itself
    parallel_devices: Sequence[torch.device] = ()  # set by Lightning
    graph: Any = None
    inputs: list[Tensor]  # the batch that a replay reads
    is_capturing, eager_steps = False, 0

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0]

    def setup(self, trainer: Trainer) -> None:
        self.trainer: Any = trainer
        if len(self.parallel_devices) > 1 or self.root_device.type != "cuda":
            raise UserError("trainer=cuda_graph: needs one CUDA GPU; set trainer.accelerator=gpu trainer.devices=1")
        if trainer.accumulate_grad_batches > 1 or not trainer.lightning_module.automatic_optimization:
            raise UserError("trainer=cuda_graph: captures whole steps; set trainer.accumulate_grad_batches=1")
        if trainer.precision == "16-mixed":
            raise UserError("trainer=cuda_graph: cannot scale gradients; set trainer.precision=bf16-mixed")
        super().setup(trainer)

    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            if "capturable" in group or "fused" in group:
                group |= {"capturable": True} if "capturable" in group else {"fused": True, "foreach": False}

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        data, self.has_indices = self.trainer.datamodule, isinstance(batch, Tensor)
        tensors = [batch] if self.has_indices else [*batch]
        if batch_idx == 0:
            self.graph, self.eager_steps = None, 0
        is_logged = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0
        fits = not self.graph or [a.shape for a in self.inputs] == [b.shape for b in tensors]
        self.is_replayed = self.eager_steps >= EAGER_STEPS and fits and not is_logged
        if self.is_replayed and not self.graph:
            self.inputs = [tensor.clone() for tensor in tensors]
        for static, tensor in zip(self.inputs, tensors, strict=True) if self.is_replayed else ():
            static.copy_(tensor)
        if self.has_indices:
            data.progress = torch.as_tensor(data.progress, dtype=torch.float64, device=self.root_device)
            data.seed_augmentation()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.is_capturing:
            batch = self.inputs[0] if self.has_indices else self.inputs
        batch = self.trainer.datamodule.make_batch(batch) if self.has_indices else batch
        return super().training_step(batch, batch_idx)

    def _run_step(self, optimizer: torch.optim.Optimizer, closure: Any, model: Any, **kwargs: Any) -> None:
        learning_rates, self.is_capturing = [group["lr"] for group in optimizer.param_groups], True
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        super().optimizer_step(optimizer, closure, model, **kwargs)
        self.loss, self.is_capturing = closure.consume_result().loss, False
        for group, lr in zip(optimizer.param_groups, learning_rates, strict=True):
            group["lr"] = lr

    def optimizer_step(self, optimizer: torch.optim.Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if not self.is_replayed:
            self.eager_steps += 1
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        groups = optimizer.param_groups
        settings = [{key: value for key, value in group.items() if key not in ("params", "lr")} for group in groups]
        if not self.graph:
            dtype = torch.float32 if {"capturable", "fused"} & groups[0].keys() else torch.float64  # PyTorch's take 32
            self.settings = settings
            self.rates = [torch.zeros((), dtype=dtype, device=self.root_device) for _ in groups]
            self.graph = self._capture(lambda: self._run_step(optimizer, closure, model, **kwargs))
        if settings != self.settings:
            raise UserError("trainer=cuda_graph: the scheduler changes more than the learning rate; leave it out")
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        set_closure_loss(closure, self.loss)

    def _capture(self, step: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        if self.has_indices and torch.__version__ < "2.14":  # newer ones register generators themselves
            graph.register_generator_state(self.trainer.datamodule.generator)
        try:
            with torch.cuda.graph(graph):
                step()
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"trainer=cuda_graph: this step cannot be captured ({reason}); leave it out") from error
        return graph
