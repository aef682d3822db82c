"""The training step as one CUDA graph: python -m src.train trainer=cuda_graph."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim import Optimizer

from src.core.compat import set_closure_loss
from src.core.errors import UserError

EAGER = 3  # steps at the start of an epoch that let PyTorch and the optimizer allocate what a graph may not


class CUDAGraphStrategy(SingleDeviceStrategy):
    """Captures augmentation, forward and backward pass, clipping and the optimizer's step; then replays them.

    Eager remain the first steps of an epoch, every `log_every_n_steps`-th, which writes, and a batch of another size;
    hooks inside a step run in those alone. Captured anew each epoch, for scores are reset and teachers' answers change.
    Between replays it sets what changes: the batch, the generator's seed, the progress, the learning rate.
    Raises UserError for what cannot be captured.
    """

    strategy_name = "graph"
    wants_indices = True  # asks src.data.datamodule for them, so that a graph reads and augments the images itself

    def __init__(self) -> None:
        super().__init__()
        self.parallel_devices: list[torch.device] = []  # Lightning sets them
        self.graph: Any = None
        self.capturing = False
        self.static: list[Tensor] = []  # the batch that a replay reads
        self.eager = 0

    @property
    def root_device(self) -> torch.device:
        return self.parallel_devices[0]

    def setup(self, trainer: L.Trainer) -> None:
        self.trainer = trainer
        if len(self.parallel_devices) > 1 or self.root_device.type != "cuda":
            raise UserError("trainer=cuda_graph needs one CUDA GPU; set trainer.accelerator=gpu trainer.devices=1")
        if trainer.accumulate_grad_batches > 1 or not trainer.lightning_module.automatic_optimization:
            raise UserError("trainer=cuda_graph captures whole steps; set trainer.accumulate_grad_batches=1")
        if trainer.precision == "16-mixed":
            raise UserError(
                "trainer=cuda_graph: 16-mixed looks at each step's gradients; set trainer.precision=bf16-mixed"
            )
        super().setup(trainer)

    def setup_optimizers(self, trainer: L.Trainer) -> None:
        super().setup_optimizers(trainer)
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            takes = "capturable" if "capturable" in group else "fused" if "fused" in group else None
            if takes:
                group |= {takes: True} | ({"foreach": False} if takes == "fused" else {})

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        tensors = [batch] if isinstance(batch, Tensor) else [*batch]
        if batch_idx == 0 or not self.eager:  # not at the first when it is resumed
            self.graph, self.eager = None, 0
            self.indexed = isinstance(batch, Tensor)
            if self.indexed:
                data.progress = torch.zeros((), dtype=torch.float64, device=self.root_device)
        log = (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        fits = self.graph is None or all(a.shape == b.shape for a, b in zip(self.static, tensors, strict=True))
        self.replays = self.eager >= EAGER and fits and not log
        if self.replays and self.graph:
            for static, tensor in zip(self.static, tensors, strict=True):
                static.copy_(tensor)
        elif self.replays:
            self.static = [tensor.clone() for tensor in tensors]
        if self.indexed:
            data.begin_batch()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.capturing:
            batch = self.static[0] if self.indexed else self.static
        return super().training_step(self.trainer.datamodule.make_batch(batch) if self.indexed else batch, batch_idx)  # type: ignore[attr-defined]

    def optimizer_step(self, optimizer: Optimizer, closure: Any, model: Any = None, **kwargs: Any) -> Any:
        if not self.replays:
            self.eager += 1
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        groups = optimizer.param_groups
        settings = [{key: x for key, x in group.items() if key not in ("params", "lr")} for group in groups]
        if self.graph is None:
            self.settings = settings
            own = not any("capturable" in group or "fused" in group for group in groups)
            kind = torch.float64 if own else torch.float32  # as precise as a number in the config; PyTorch's take 32
            self.rates = [torch.zeros((), dtype=kind, device=self.root_device) for _ in groups]
            generators = [self.trainer.datamodule.generator] if self.indexed else []  # type: ignore[attr-defined]
            self.graph = capture_graph(lambda: self._whole_step(optimizer, closure, model, **kwargs), generators)
        elif settings != self.settings:
            raise UserError(
                "trainer=cuda_graph: the schedule changes more than the learning rate; leave trainer=cuda_graph out"
            )
        for rate, group in zip(self.rates, groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        set_closure_loss(closure, self.loss)
        return None

    def _whole_step(self, optimizer: Optimizer, closure: Any, model: Any, **kwargs: Any) -> None:
        before, self.capturing = [group["lr"] for group in optimizer.param_groups], True
        try:
            for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate
            super().optimizer_step(optimizer, closure, model, **kwargs)
            self.loss = closure.consume_result().loss
        finally:
            self.capturing = False
            for group, lr in zip(optimizer.param_groups, before, strict=True):
                group["lr"] = lr


def capture_graph(step: Callable[[], None], generators: Sequence[torch.Generator]) -> Any:
    """What `step` does on the GPU, to be replayed; it is not done yet. It draws from `generators` and PyTorch's own."""
    graph = torch.cuda.CUDAGraph()
    for generator in generators if torch.__version__ < "2.14" else ():  # newer ones see for themselves
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            step()
    except (RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"trainer=cuda_graph: this step cannot be captured ({reason}); leave trainer=cuda_graph out"
        ) from error
    return graph
