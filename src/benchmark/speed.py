"""The runs that src.benchmark times, and how they take turns."""

import argparse
import copy
import itertools
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src.core.config import CONF, resolve_and_validate
from src.core.errors import UserError
from src.core.process import resolve_precision, resolve_threads
from src.core.run_folder import METRICS_FILE, read_metrics
from src.data.datasets import LabeledImages
from src.data.image_spec import MNIST_MEAN, MNIST_STD
from src.models.cnn import CNN
from src.train import train
from src.training.instantiate import instantiate_node

WARMUP = 10  # untimed batches at the start of each turn, which the turn before slows down
BATCH_SIZES = 64, 128, 256, 512, 1024, 2048  # of the table of a GPU
BASELINE_EPOCHS = 19
QUIET = (  # a run of a multirun prints nothing
    *("hydra.mode=MULTIRUN", "callbacks.progress=null", "callbacks.model_summary=null", "callbacks.best=null"),
    *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=0", "optimized_metric=null"),
)
ENDLESS = "trainer.max_epochs=-1", "trainer.accumulate_grad_batches=1", "test=false"


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


def start_bare_loop(trainer: Any) -> Iterator[None]:
    """Start run a, with copies of the network and the optimizer of b, and batches made as those of b."""
    net, optimizer = copy.deepcopy((trainer.lightning_module.net, trainer.optimizers[0]))
    data, autocast = trainer.datamodule, trainer.precision_plugin.train_step_context
    get_epoch = lambda: map(data.make_batch, data.train_dataloader())  # noqa: E731
    return train_steps(net, optimizer, get_epoch, trainer.gradient_clip_val, autocast)


class PerImageDataset(Dataset):
    """Do what torchvision.datasets.MNIST does per image: convert to PIL, to a tensor, normalise."""

    def __init__(self, images: LabeledImages) -> None:
        self.images, self.labels = images.images.cpu().numpy(), images.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MNIST_MEAN,), (MNIST_STD,))])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index, 0])), self.labels[index]


def start_baseline(data: Any, batch_size: int) -> tuple[nn.Module, int, Iterator[None]]:
    """Start run c; return its network, the batches of an epoch and its steps."""
    net = CNN(dropout=0.25).to(data.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(PerImageDataset(data.splits.train), batch_size=batch_size, shuffle=True)
    get_epoch = lambda: ((images.to(data.device), labels.to(data.device)) for images, labels in loader)  # noqa: E731
    return net, len(loader), train_steps(net, optimizer, get_epoch)


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

    def __init__(self, count: int, rounds: int, starts: dict[str, Callable[[Any], Iterator[None]]]) -> None:
        self.count, self.rounds, self.starts, self.started_at = count, rounds, starts, 0.0
        self.runs: dict[str, Iterator[None]] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in ("b", *starts)}  # per round

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.runs = {name: start(trainer) for name, start in self.starts.items()}
        self.trainer: Any = trainer

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


def compose(overrides: list[str], folder: str = ".") -> DictConfig:
    """Return the checked config of a quiet run of src.train, and make its Hydra config the current one."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", [*overrides, *QUIET, f"output_dir={folder}"], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    config = resolve_and_validate(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    resolve_precision(config)
    resolve_threads(config)
    return config


def train_run(overrides: list[str], *callbacks: Callback) -> dict[str, Any]:
    """Train as src.train does, without validating; return metrics.json. The run folder is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        train(compose(overrides, folder), *callbacks)
        return read_metrics(Path(folder, METRICS_FILE))


def time_turns(overrides: list[str], timer: InterleavedTimer) -> dict[str, Any]:
    """Train b with interruptions by `timer` and return metrics.json."""
    steps = (WARMUP + timer.count) * timer.rounds + 1
    return train_run([*overrides, *ENDLESS, f"trainer.max_steps={steps}"], timer)


def print_throughput(overrides: list[str], count: int, rounds: int) -> str:
    """Print images per second of a, b and c, and the ratios b/a and b/c; return the type of the device."""
    start_c = lambda trainer: start_baseline(trainer.datamodule, trainer.datamodule.train_batch_size)[2]  # noqa: E731
    timer = InterleavedTimer(count, rounds, {"c": start_c, "a": start_bare_loop})
    results, data = time_turns(overrides, timer), timer.trainer.datamodule
    print(f"{results['data']}, {results['device']}, batch {data.train_batch_size}")
    seconds = {name: sum(values) for name, values in timer.seconds.items()}
    for name in "abc":
        print(f"{name}    {count * rounds * data.train_batch_size / seconds[name]:8,.0f} images/s")
    for name in "ac":
        ratios = [other / own for own, other in zip(timer.seconds["b"], timer.seconds[name], strict=True)]
        error = f" ± {statistics.stdev(ratios) / rounds**0.5:.3f}" if rounds > 1 else ""
        print(f"b/{name}  {seconds[name] / seconds['b']:8.3f}{error}  ({min(ratios):.3f} to {max(ratios):.3f})")
    return data.device.type


def print_batch_sizes(overrides: list[str], count: int, rounds: int) -> None:
    """Print the speed of b on a GPU at several batch sizes, with and without a CUDA graph."""
    for trainer, size in itertools.product(("default", "cuda_graph"), BATCH_SIZES):
        timer = InterleavedTimer(count, rounds, {})
        time_turns([*overrides, f"trainer={trainer}", "trainer.accelerator=gpu", f"data.batch_size={size}"], timer)
        step = sum(timer.seconds["b"]) / (count * rounds)
        print(f"trainer={trainer:<10} {size:>5} {size / step:10,.0f} images/s {1000 * step:8.3f} ms/step", flush=True)


def print_time_to(target: float, overrides: list[str], seeds: int) -> None:
    """Print how much longer c, which sees all images, takes to `target` percent than b takes to its end."""
    config = compose([*overrides, "data.train_size=null"])
    own_cache = ["data.soft_labels.folder='${output_dir}/soft_labels'"] * ("soft_labels" in config.data)
    seconds, accuracies = [], []
    for seed in range(config.seed, config.seed + seeds):
        results = train_run([*overrides, *own_cache, f"seed={seed}"])
        seconds.append(results["seconds"]["fit"])
        accuracies.append(100 * results["metrics"]["test/acc"])
        print(f"b  seed {seed}  {accuracies[-1]:.2f}% at the end, {seconds[-1]:.1f} s", flush=True)

    L.seed_everything(config.seed, verbose=False)
    data = instantiate_node("data", config.data)
    data.trainer = instantiate_node("trainer", config.trainer, callbacks=[], logger=False)  # knows the device
    data.prepare_data()
    data.setup()
    net, batches, steps = start_baseline(data, batch_size=128)
    duration, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < target and epoch < BASELINE_EPOCHS:
        duration, epoch = duration + measure(steps, batches, data.device), epoch + 1
        net.eval()
        with torch.no_grad():
            is_right = [net(data.spec.normalize(x)).argmax(1) == y for x, y in data.raw_batches("test")]
        accuracy = 100 * torch.cat(is_right).float().mean().item()
        net.train()
    print(f"c  seed {config.seed}  {accuracy:.2f}% after {epoch} epochs, {duration:.1f} s")
    deviation = f" ± {statistics.stdev(accuracies):.2f}" if seeds > 1 else ""
    print(f"b    {statistics.mean(accuracies):.2f}{deviation}% ({min(accuracies):.2f} to {max(accuracies):.2f})")
    print(f"c/b  {duration / statistics.mean(seconds):.1f}")


def run(chosen: argparse.Namespace) -> None:
    """Run the benchmark that the command line has chosen."""
    if chosen.time_to:
        # An experiment that the command names comes later, and Hydra takes the last.
        return print_time_to(chosen.time_to, ["experiment=fast", *chosen.overrides], chosen.seeds)
    if "soft_labels" in compose(chosen.overrides).data:
        raise UserError("data.soft_labels: the bare loop has no distillation; add data=mnist")
    if print_throughput(chosen.overrides, chosen.batches, chosen.rounds) == "cuda":
        print_batch_sizes(chosen.overrides, chosen.batches, chosen.rounds)
