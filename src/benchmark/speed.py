"""The runs that src.benchmark times, and how they take turns."""

import copy
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from scipy.stats import t
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader
from torchvision import transforms

from src.core.config import CONF, resolve_and_validate
from src.core.errors import UserError
from src.core.process import configure_hardware
from src.core.run_folder import METRICS_FILE, read_metrics
from src.data.image_spec import MNIST_MEAN, MNIST_STD
from src.data.sampler import hash_seed
from src.models.cnn import CNN
from src.train import train
from src.training.instantiate import instantiate_node

WARMUP = 10  # untimed batches at the start of each turn, which the turn before slows down
BASELINE_EPOCHS = 19
QUIET = (  # a run of a multirun prints nothing
    *("hydra.mode=MULTIRUN", "callbacks.progress=null", "callbacks.model_summary=null", "callbacks.best=null"),
    *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=0", "optimized_metric=null"),
)


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


def start_baseline(data: Any, batch_size: int) -> tuple[nn.Module, int, Iterator[None]]:
    """Start run c; return its network, the batches of an epoch and its steps."""
    net = CNN(dropout=0.25).to(data.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MNIST_MEAN,), (MNIST_STD,))])

    def collate(samples: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        """Do what torchvision.datasets.MNIST does per image: convert to PIL, to a tensor, normalise."""
        images = torch.stack([convert(Image.fromarray(pixels[0])) for pixels, _ in samples])
        return images.to(data.device), torch.tensor([label for _, label in samples], device=data.device)

    train = data.splits.train
    samples: Any = list(zip(train.images.cpu().numpy(), train.labels.tolist(), strict=True))
    loader = DataLoader(samples, batch_size=batch_size, shuffle=True, collate_fn=collate)
    return net, len(loader), train_steps(net, optimizer, lambda: loader)


def measure(steps: Iterator[None], count: int, device: torch.device) -> float:
    """Return the seconds that `count` steps take."""
    torch.get_device_module(device).synchronize()
    started_at = perf_counter()
    for _ in itertools.islice(steps, count):
        pass
    torch.get_device_module(device).synchronize()
    return perf_counter() - started_at


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; not a number for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


class InterleavedTimer(Callback):
    """Interrupt a fit after every WARMUP + `count` batches for as many steps of each of the other runs."""

    def __init__(self, count: int, rounds: int) -> None:
        self.count, self.rounds, self.started_at = count, rounds, 0.0
        self.others: dict[str, Iterator[None]] = {}
        self.seconds: dict[str, list[float]] = {name: [] for name in "abc"}  # per round

    def on_train_start(self, trainer: Any, pl_module: L.LightningModule) -> None:
        self.data = trainer.datamodule
        *_, baseline = start_baseline(self.data, self.data.train_batch_size)
        self.others = {"c": baseline, "a": start_bare_loop(trainer)}

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        turn, step = divmod(trainer.global_step, WARMUP + self.count)
        if step in (0, WARMUP):
            torch.get_device_module(pl_module.device).synchronize()
        if step == 0 and turn:
            self.seconds["b"].append(perf_counter() - self.started_at)
        if step == 0 and turn < self.rounds:
            for name, steps in self.others.items():
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
    configure_hardware(config)
    return config


def train_run(overrides: list[str], *callbacks: Callback) -> dict[str, Any]:
    """Train as src.train does, without validating; return metrics.json. The run folder is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        train(compose(overrides, folder), *callbacks)
        return read_metrics(Path(folder, METRICS_FILE))


def print_throughput(overrides: list[str], count: int, rounds: int) -> None:
    """Print images per second of a, b and c, and the ratios b/a and b/c."""
    if "soft_labels" in compose(overrides).data:
        raise UserError("data.soft_labels: the bare loop has no distillation; add data=mnist")
    timer = InterleavedTimer(count, rounds)
    steps = f"trainer.max_steps={(WARMUP + count) * rounds + 1}", "trainer.max_epochs=-1"
    results = train_run([*overrides, *steps, "trainer.accumulate_grad_batches=1", "test=false"], timer)
    batch_size = timer.data.train_batch_size
    print(f"{results['data']}, {results['device']}, batch {batch_size}")
    seconds = {name: sum(values) for name, values in timer.seconds.items()}
    for name in "abc":
        print(f"{name}    {count * rounds * batch_size / seconds[name]:8,.0f} images/s")
    for name in "ac":
        ratios = [other / own for own, other in zip(timer.seconds["b"], timer.seconds[name], strict=True)]
        spread = f"± {standard_error(ratios):.3f}  ({min(ratios):.3f} to {max(ratios):.3f})"
        print(f"b/{name}  {seconds[name] / seconds['b']:8.3f} {spread}")


def time_runs(overrides: list[str], seeds: range) -> Iterator[tuple[float, float]]:
    """Train b to its end with each seed; yield its seconds and its test accuracy in percent."""
    for seed in seeds:
        results = train_run([*overrides, f"seed={seed}"])
        seconds, accuracy = results["seconds"]["fit"], 100 * results["metrics"]["test/acc"]
        print(f"b  seed {seed}  {accuracy:.2f}% at the end, {seconds:.1f} s", flush=True)
        yield seconds, accuracy


def time_baseline(data: Any, target: float, seed: int) -> Iterator[float]:
    """Train c until it has `target` percent test accuracy; yield the seconds of each epoch, without the test."""
    torch.manual_seed(seed)
    net, batches, steps = start_baseline(data, batch_size=128)
    seconds: list[float] = []
    accuracy = 0.0
    while accuracy < target and len(seconds) < BASELINE_EPOCHS:
        torch.manual_seed(hash_seed(seed, len(seconds)))  # the runs between the epochs draw numbers as well
        seconds.append(measure(steps, batches, data.device))
        net.eval()
        with torch.no_grad():
            is_right = [net(data.spec.normalize(x)).argmax(1) == y for x, y in data.raw_batches("test")]
        accuracy = 100 * torch.cat(is_right).float().mean().item()
        net.train()
        yield seconds[-1]
    print(f"c  seed {seed}  {accuracy:.2f}% after {len(seconds)} epochs, {sum(seconds):.1f} s", flush=True)


def print_time_to(target: float, overrides: list[str], seeds: int, baseline_seeds: int) -> None:
    """Print how much longer c, which sees all images, takes to `target` percent than b takes to its end.

    After each run of b, every c trains for an epoch, so that a noisy machine is noisy for both.
    """
    config = compose([*overrides, "data.train_size=null"])
    data = instantiate_node("data", config.data)
    data.trainer = instantiate_node("trainer", config.trainer, callbacks=[], logger=False)  # knows the device
    data.prepare_data()
    data.setup()
    if "soft_labels" in config.data:
        overrides = [*overrides, "data.soft_labels.folder='${output_dir}/soft_labels'"]
    baselines = [time_baseline(data, target, config.seed + i) for i in range(baseline_seeds)]
    rounds = itertools.zip_longest(time_runs(overrides, range(config.seed, config.seed + seeds)), *baselines)
    runs, *epochs = ([x for x in column if x is not None] for column in zip(*rounds, strict=True))
    seconds_b, accuracies = zip(*runs, strict=True)
    seconds_c = [sum(seconds) for seconds in epochs]
    mean_b, mean_c, accuracy = (statistics.mean(x) for x in (seconds_b, seconds_c, accuracies))
    error = standard_error(accuracies)
    low, high = t.interval(0.95, seeds - 1, accuracy, error)
    interval = f"95% CI of the mean {low:.3f} to {high:.3f}%"
    print(f"c    {statistics.mean(map(len, epochs)):.1f} epochs, {mean_c:.1f} s")
    print(f"b    {accuracy:.2f} ± {error * seeds**0.5:.2f}%, {interval}, {mean_b:.1f} s")
    # The relative errors of the two means add in squares.
    error = math.hypot(standard_error(seconds_c) / mean_c, standard_error(seconds_b) / mean_b)
    print(f"c/b  {mean_c / mean_b:.1f} ± {error * mean_c / mean_b:.1f}")
