"""The runs that src.benchmark times, and how they take turns."""

import argparse
import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src.core.config import CONF, resolve_and_validate
from src.core.errors import UserError
from src.core.process import disable_malloc_trimming, resolve_precision
from src.data.datamodule import ImageDataModule
from src.data.datasets import LabeledImages
from src.data.image_spec import MNIST_MEAN, MNIST_STD
from src.models.cnn import CNN
from src.training.console import silence_routine_output
from src.training.instantiate import (
    build_network,
    instantiate_all,
    instantiate_node,
    instantiate_partial,
    instantiate_task,
)
from src.training.run_record import get_device_name

WARMUP = 10  # untimed batches at the start of each turn, which the turn before slows down
BATCH_SIZES = 64, 128, 256, 512, 1024, 2048  # of the table of a GPU
BASELINE_EPOCHS = 19


def train_steps(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    get_epoch: Callable[[], Iterable[Any]],
    clip: float | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[None]:
    """Train without end, one batch for each `next`."""
    while True:
        for images, labels in get_epoch():
            with autocast():
                loss = nll_loss(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            yield


def start_bare_loop(cfg: DictConfig, data: ImageDataModule) -> Iterator[None]:
    """Start run a. Its batches are made like those of b, which must be training meanwhile."""
    net = build_network("model", cfg.model, data.spec).to(data.device)
    optimizer = instantiate_partial("optimizer", cfg.optimizer, "groups")[0](net.parameters())
    clip, autocast = cfg.trainer.gradient_clip_val, data.trainer.precision_plugin.train_step_context  # type: ignore[union-attr]
    return train_steps(net, optimizer, lambda: map(data.make_batch, data.train_dataloader()), clip, autocast)


class PerImageDataset(Dataset):
    """Do what torchvision.datasets.MNIST does per image: convert to PIL, to a tensor, normalise."""

    def __init__(self, images: LabeledImages) -> None:
        self.images, self.labels = images.images.cpu().numpy(), images.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MNIST_MEAN,), (MNIST_STD,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0])), self.labels[index]


def start_baseline(data: ImageDataModule, batch_size: int) -> tuple[nn.Module, int, Iterator[None]]:
    """Start run c; return its network, the batches of an epoch and its steps."""
    net = CNN(dropout=0.25).to(data.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    train: Any = data.splits.train
    loader = DataLoader(PerImageDataset(train), batch_size=batch_size, shuffle=True)
    return (
        net,
        len(loader),
        train_steps(net, optimizer, lambda: ((x.to(data.device), y.to(data.device)) for x, y in loader)),
    )


def measure(steps: Iterator[None], count: int, device: torch.device) -> float:
    """Return the seconds that `count` steps take."""
    torch.get_device_module(device).synchronize()
    started_at = perf_counter()
    for _ in itertools.islice(steps, count):
        pass
    torch.get_device_module(device).synchronize()
    return perf_counter() - started_at


class InterleavedTimer(Callback):
    """Interrupt a fit after every WARMUP + `count` batches for as many steps of each of the other runs."""

    def __init__(self, runs: dict[str, Iterator[None]], count: int, rounds: int) -> None:
        self.runs, self.count, self.rounds, self.started_at = runs, count, rounds, 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in ("b", *runs)}  # per round

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        turn, step = divmod(trainer.global_step, WARMUP + self.count)
        if step in (0, WARMUP):
            torch.get_device_module(pl_module.device).synchronize()
        if step == 0 and turn:
            self.seconds["b"].append(perf_counter() - self.started_at)
        if step == 0 and turn < self.rounds:
            for name, steps in self.runs.items():
                measure(steps, WARMUP, pl_module.device)
                self.seconds[name].append(measure(steps, self.count, pl_module.device))
        if step == WARMUP:
            self.started_at = perf_counter()


@contextmanager
def fit(cfg: DictConfig, data: ImageDataModule, *callbacks: Callback, **settings: Any) -> Iterator[L.Trainer]:
    """Train as src.train does, without printing or validating; the run folder is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        cfg.output_dir = folder
        resolved = resolve_and_validate(cfg)
        module, _ = instantiate_task(resolved, data)
        nodes = {k: node for k, node in resolved.callbacks.items() if k not in ("model_summary", "progress", "best")}
        settings = {"limit_val_batches": 0, "enable_progress_bar": False, **settings}
        settings["callbacks"] = [*instantiate_all("callbacks", nodes), *callbacks]
        settings["logger"] = instantiate_all("logger", resolved.logger)
        trainer = instantiate_node("trainer", resolved.trainer, **settings)
        trainer.fit(module, data)
        yield trainer


def time_turns(cfg: DictConfig, data: ImageDataModule, timer: InterleavedTimer) -> dict[str, list[float]]:
    """Return the seconds of each round of b and of the other runs of `timer`."""
    steps = (WARMUP + timer.count) * timer.rounds + 1
    with fit(cfg, data, timer, max_steps=steps, max_epochs=-1, accumulate_grad_batches=1):
        return timer.seconds


def print_throughput(cfg: DictConfig, data: ImageDataModule, count: int, rounds: int) -> None:
    """Print images per second of a, b and c, and the ratios b/a and b/c."""
    *_, baseline = start_baseline(data, data.train_batch_size)
    timer = InterleavedTimer({"c": baseline, "a": start_bare_loop(cfg, data)}, count, rounds)
    rounds_of = time_turns(cfg, data, timer)
    seconds = {name: sum(values) for name, values in rounds_of.items()}
    for name in "abc":
        print(f"{name}    {count * rounds * data.train_batch_size / seconds[name]:8,.0f} images/s")
    for name in "ac":
        ratios = [other / own for own, other in zip(rounds_of["b"], rounds_of[name], strict=True)]
        error = f" ± {statistics.stdev(ratios) / rounds**0.5:.3f}" if rounds > 1 else ""
        print(f"b/{name}  {seconds[name] / seconds['b']:8.3f}{error}  ({min(ratios):.3f} to {max(ratios):.3f})")


def print_batch_sizes(overrides: list[str], count: int, rounds: int) -> None:
    """Print the speed of b at several batch sizes, with and without a CUDA graph."""
    for trainer, size in itertools.product(("default", "cuda_graph"), BATCH_SIZES):
        cfg, data = prepare([*overrides, f"trainer={trainer}", "trainer.accelerator=gpu", f"data.batch_size={size}"])
        step = sum(time_turns(cfg, data, InterleavedTimer({}, count, rounds))["b"]) / (count * rounds)
        print(
            f"trainer={trainer:<10}  batch {size:>4}  {size / step:10,.0f} images/s  {1000 * step:7.3f} ms/step",
            flush=True,
        )


def print_time_to(target: float, cfg: DictConfig, data: ImageDataModule, whole: ImageDataModule, seeds: int) -> None:
    """Print how much longer c, which sees the `whole` data, takes to `target` percent than b takes to its end."""
    first, seconds, accuracies = cfg.seed, [], []
    for seed in range(first, first + seeds):
        cfg.seed = data.seed = seed
        L.seed_everything(seed, verbose=False)
        with tempfile.TemporaryDirectory() as folder:
            if data.soft_labels:  # none of earlier runs
                data.soft_labels.folder, data.epoch_soft_labels = Path(folder), (-1, None)
            started_at = perf_counter()
            with fit(cfg, data) as trainer:
                seconds.append(perf_counter() - started_at)
                accuracies.append(100 * trainer.test(trainer.lightning_module, data, verbose=False)[0]["test/acc"])
        print(f"b  seed {seed}  {accuracies[-1]:.2f}% at the end, {seconds[-1]:.1f} s", flush=True)

    L.seed_everything(first, verbose=False)
    net, batches, steps = start_baseline(whole, batch_size=128)
    duration, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < target and epoch < BASELINE_EPOCHS:
        duration, epoch = duration + measure(steps, batches, whole.device), epoch + 1
        net.eval()
        with torch.no_grad():
            is_right = [net(whole.spec.normalize(x)).argmax(1) == y for x, y in whole.raw_batches("test")]
        accuracy = 100 * torch.cat(is_right).float().mean().item()
        net.train()
    print(f"c  seed {first}  {accuracy:.2f}% after {epoch} epochs, {duration:.1f} s")
    deviation = f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""
    print(f"b    {statistics.mean(accuracies):.2f}{deviation}% ({min(accuracies):.2f} to {max(accuracies):.2f})")
    print(f"c/b  {duration / statistics.mean(seconds):.1f}")


def prepare(overrides: list[str]) -> tuple[DictConfig, ImageDataModule]:
    """Return the config of src.train with its interpolations, and its data module with the images on the device."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*overrides, "output_dir=."])
    resolve_and_validate(cfg)
    resolve_precision(cfg)
    data = instantiate_node("data", cfg.data)
    data.trainer = instantiate_node("trainer", cfg.trainer, callbacks=[], logger=False)
    data.prepare_data()
    data.setup("fit")
    return cfg, data


def run(chosen: argparse.Namespace) -> None:
    """Run the benchmark that the command line has chosen."""
    silence_routine_output()
    disable_malloc_trimming()
    warnings.filterwarnings("ignore", message=".*val_dataloader")
    has_experiment = any(override.startswith("experiment=") for override in chosen.overrides)
    overrides = [*["experiment=fast"] * bool(chosen.time_to and not has_experiment), *chosen.overrides]
    cfg, data = prepare(overrides)
    if data.soft_labels and not chosen.time_to:
        raise UserError("data.soft_labels: the bare loop has no distillation; add data=mnist")
    print(f"{data.spec.name}, {get_device_name(data.device)}, batch {data.train_batch_size}", flush=True)
    if chosen.time_to:
        print_time_to(chosen.time_to, cfg, data, prepare([*overrides, "data.train_size=null"])[1], chosen.seeds)
    else:
        print_throughput(cfg, data, chosen.batches, chosen.rounds)
        if data.device.type == "cuda":
            print_batch_sizes(chosen.overrides, chosen.batches, chosen.rounds)
