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
from src.data.sampler import make_generator
from src.models.cnn import CNN
from src.training.console import silence_routine_output
from src.training.instantiate import infer_network_arguments, instantiate_all, instantiate_node, instantiate_task
from src.training.run_record import get_device_name

WARMUP = 10  # untimed batches at the start of each turn, which the turn before slows down
BASELINE_EPOCHS = 19


class PerImageDataset(Dataset):
    """Do what torchvision.datasets.MNIST does per image: convert to PIL, to a tensor, normalise."""

    def __init__(self, data: ImageDataModule) -> None:
        train: Any = data.splits.train
        self.images = LabeledImages(train.images.cpu(), train.labels.cpu())
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MNIST_MEAN,), (MNIST_STD,))])

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.images[index, 0].numpy())
        return self.transform(image), int(self.images.labels[index])


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


def measure(steps: Iterator[None], count: int, device: torch.device) -> float:
    """Return the seconds that `count` steps take."""
    torch.get_device_module(device).synchronize()
    started_at = perf_counter()
    for _ in itertools.islice(steps, count):
        pass
    torch.get_device_module(device).synchronize()
    return perf_counter() - started_at


def iterate_epoch(cfg: DictConfig, data: ImageDataModule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield an epoch of augmented, normalised batches, made of the same tensors as ours."""
    train: Any = data.splits.train
    for step, indices in enumerate(data.train_dataloader()):
        images, labels = train.images[indices], train.labels[indices]
        if data.augment:
            images = data.augment(images.float(), make_generator(cfg.seed, step, 0, device=device))
        yield data.spec.normalize(images), labels


def start_bare_loop(cfg: DictConfig, data: ImageDataModule, device: torch.device) -> Iterator[None]:
    """Start run a."""
    net = instantiate_node("model", cfg.model, **infer_network_arguments(cfg.model, data.spec)).to(device)
    optimizer = instantiate_node("optimizer", cfg.optimizer)(net.parameters())
    trainer: Any = data.trainer
    autocast = trainer.precision_plugin.train_step_context
    return train_steps(
        net, optimizer, lambda: iterate_epoch(cfg, data, device), cfg.trainer.gradient_clip_val, autocast
    )


def start_baseline(
    data: ImageDataModule, batch_size: int, device: torch.device
) -> tuple[nn.Module, DataLoader, Iterator[None]]:
    """Start run c; return its network, its loader and its steps."""
    net = CNN(dropout=0.25).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(PerImageDataset(data), batch_size=batch_size, shuffle=True)
    return net, loader, train_steps(net, optimizer, lambda: ((x.to(device), y.to(device)) for x, y in loader))


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
        printing = "model_summary", "progress", "best"
        own = instantiate_all("callbacks", {k: node for k, node in resolved.callbacks.items() if k not in printing})
        settings = {"limit_val_batches": 0, "enable_progress_bar": False, **settings}
        loggers = instantiate_all("logger", resolved.logger)
        trainer = instantiate_node(
            "trainer", resolved.trainer, callbacks=[*own, *callbacks], logger=loggers, **settings
        )
        trainer.fit(module, data)
        yield trainer


def print_throughput(cfg: DictConfig, data: ImageDataModule, count: int, rounds: int, device: torch.device) -> None:
    """Print images per second of a, b and c, and the ratios b/a and b/c."""
    *_, baseline = start_baseline(data, data.train_batch_size, device)
    timer = InterleavedTimer({"c": baseline, "a": start_bare_loop(cfg, data, device)}, count, rounds)
    with fit(cfg, data, timer, max_steps=(WARMUP + count) * rounds + 1, max_epochs=-1, accumulate_grad_batches=1):
        pass
    seconds = {name: sum(values) for name, values in timer.seconds.items()}
    for name in "abc":
        print(f"{name}    {count * rounds * data.train_batch_size / seconds[name]:8,.0f} images/s")
    for name in "ac":
        ratios = [other / own for own, other in zip(timer.seconds["b"], timer.seconds[name], strict=True)]
        error = f" ± {statistics.stdev(ratios) / rounds**0.5:.3f}" if rounds > 1 else ""
        print(f"b/{name}  {seconds[name] / seconds['b']:8.3f}{error}  ({min(ratios):.3f} to {max(ratios):.3f})")


def train_recipe(cfg: DictConfig, data: ImageDataModule, seed: int) -> tuple[float, float]:
    """Return the seconds of training and the test accuracy in percent of a recipe with a seed."""
    cfg.seed = data.seed = seed
    L.seed_everything(seed, verbose=False)
    started_at = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if data.soft_labels:  # none of earlier runs
            data.soft_labels.folder, data.epoch_soft_labels = Path(folder), (-1, None)
        with fit(cfg, data) as trainer:
            seconds = perf_counter() - started_at
            return seconds, 100 * trainer.test(trainer.lightning_module, data, verbose=False)[0]["test/acc"]


def train_baseline_to(target: float, data: ImageDataModule, device: torch.device) -> tuple[float, float, int]:
    """Return the seconds of training, the test accuracy in percent and the epochs until c reaches `target` percent."""
    net, loader, steps = start_baseline(data, 128, device)
    seconds, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < target and epoch < BASELINE_EPOCHS:
        seconds, epoch = seconds + measure(steps, len(loader), device), epoch + 1
        net.eval()
        with torch.no_grad():
            batches = [net(data.spec.normalize(x)).argmax(1) == y for x, y in data.raw_batches("test")]
        accuracy = 100 * torch.cat(batches).float().mean().item()
        net.train()
    return seconds, accuracy, epoch


def print_time_to(target: float, cfg: DictConfig, data: ImageDataModule, whole: ImageDataModule, chosen: Any) -> None:
    """Print how much longer c, which sees the `whole` data, takes to `target` percent than b takes to its end."""
    accuracies, ratios, first, device = [], [], cfg.seed, whole.device
    for turn in range(chosen.rounds or 1):
        seconds = []
        for seed in range(first + turn * chosen.seeds, first + (turn + 1) * chosen.seeds):
            duration, accuracy = train_recipe(cfg, data, seed)
            print(f"b  seed {seed}  {accuracy:.2f}% at the end, {duration:.1f} s", flush=True)
            seconds.append(duration)
            accuracies.append(accuracy)
        L.seed_everything(first + turn, verbose=False)
        duration, accuracy, epochs = train_baseline_to(target, whole, device)
        print(f"c  seed {first + turn}  {accuracy:.2f}% after {epochs} epochs, {duration:.1f} s", flush=True)
        ratios.append(duration / statistics.mean(seconds))
    print(f"b    {format_mean(accuracies)}%")
    print(f"c/b  {statistics.median(ratios):.1f}  ({min(ratios):.1f} to {max(ratios):.1f})")


def format_mean(values: list[float]) -> str:
    """Return mean ± standard deviation and the range."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation} ({min(values):.2f} to {max(values):.2f})"


def print_gpu_table(chosen: Any, device: torch.device) -> None:
    """Print every figure of a GPU, each as soon as it is known."""
    ways = {"eager": [], "cuda_graph": ["trainer=cuda_graph"]}
    rounds, large = chosen.rounds or 6, ["data.batch_size=512", "optimizer.lr=0.3"]
    for way, overrides in ways.items():
        print(f"default recipe, {way}", flush=True)
        cfg = compose([*overrides, *chosen.overrides])
        print_throughput(cfg, prepare_data(cfg), chosen.batches, rounds, device)
    recipe = ["experiment=fast", "callbacks.tensorboard=null", *chosen.overrides]
    data = prepare_data(compose(recipe))
    for size, (way, overrides) in itertools.product((64, 128, 256, 512, 1024, 2048), ways.items()):
        timer, data.batch_size = InterleavedTimer({}, chosen.batches, rounds), size
        steps = (WARMUP + chosen.batches) * rounds + 1
        with fit(compose([*recipe, *overrides]), data, timer, max_steps=steps, max_epochs=-1):
            step = sum(timer.seconds["b"]) / (chosen.batches * rounds)
        print(f"fast, batch {size:>4}, {way}  {size / step:10,.0f} images/s  {1000 * step:7.3f} ms/step", flush=True)
    recipes = {"fast": [], "512, 3 epochs": [*large, "trainer.max_epochs=3"]}
    for (name, own), (way, overrides) in itertools.product(recipes.items(), ways.items()):
        cfg = compose([*recipe, *own, *overrides])
        data.batch_size = cfg.data.batch_size
        results = [train_recipe(cfg, data, cfg.seed + 1) for _ in range(chosen.seeds)]
        seconds, accuracies = (list(values) for values in zip(*results, strict=True))
        print(f"{name}, {way}  {format_mean(accuracies)}% after {format_mean(seconds)} s", flush=True)


def compose(overrides: list[str]) -> DictConfig:
    """Compose and validate the config of src.train, with its interpolations."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", overrides=[*overrides, "output_dir=."])
    resolve_and_validate(cfg)
    resolve_precision(cfg)
    return cfg


def prepare_data(cfg: DictConfig) -> ImageDataModule:
    """Return the data module of a config, with its images on the device."""
    data = instantiate_node("data", cfg.data)
    data.trainer = instantiate_node("trainer", cfg.trainer, callbacks=[], logger=False)
    data.prepare_data()
    data.setup("fit")
    return data


def run(chosen: argparse.Namespace) -> None:
    """Run the benchmark that the command line has chosen."""
    silence_routine_output()
    disable_malloc_trimming()
    warnings.filterwarnings("ignore", message=".*val_dataloader")
    has_experiment = any(override.startswith("experiment=") for override in chosen.overrides)
    overrides = [*["experiment=fast"] * bool(chosen.time_to and not has_experiment), *chosen.overrides]
    cfg = compose(overrides)
    if cfg.data.get("soft_labels") and not chosen.time_to:
        raise UserError("data.soft_labels: the bare loop has no distillation; add data=mnist")
    data = prepare_data(cfg)
    print(f"{data.spec.name}, {get_device_name(data.device)}, batch {data.train_batch_size}", flush=True)
    if chosen.time_to:
        whole = prepare_data(compose([*overrides, "data.train_size=null"]))
        print_time_to(chosen.time_to, cfg, data, whole, chosen)
    elif data.device.type == "cuda":
        print_gpu_table(chosen, data.device)
    else:
        print_throughput(cfg, data, chosen.batches, chosen.rounds or 20, data.device)
