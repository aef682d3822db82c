"""The runs that src.benchmark times, and how they take turns."""

import copy
import itertools
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from PIL import Image
from scipy.stats import sem, t
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms

from src.core.config import CONF, resolve_and_validate
from src.core.errors import UserError
from src.core.process import configure_hardware
from src.core.run_folder import METRICS_FILE, read_file
from src.data.sampler import hash_seed
from src.models.cnn import CNN
from src.train import train
from src.training.console import silence_routine_output
from src.training.instantiate import instantiate_node

WARMUP, TIMED = 10, 33  # steps of a turn; the turn before slows the first ones down
BASELINE_EPOCHS = 19
FIXED = "trainer.limit_val_batches=0", "callbacks.best=null", "callbacks.model_summary=null", "optimized_metric=null"


def compose(overrides: list[str]) -> DictConfig:
    """Return the checked config of a run of src.train that does not validate."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = resolve_and_validate(hydra.compose("train", [*overrides, *FIXED]))
    configure_hardware(config)
    return config


def train_run(overrides: list[str], *callbacks: Callback) -> dict[str, Any]:
    """Train as src.train does, but print nothing; return metrics.json. The run folder is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        train(compose([*overrides, f"output_dir={folder}"]), *callbacks)
        return read_file(Path(folder, METRICS_FILE))


def train_bare(trainer: Any) -> Iterator[None]:
    """Train copies of a run's network and optimizer without end, on batches made as those of the run."""
    net, optimizer = copy.deepcopy((trainer.lightning_module.net, trainer.optimizers[0]))
    data = trainer.datamodule
    while True:
        for images, labels in map(data.make_batch, data.train_dataloader()):
            with trainer.precision_plugin.train_step_context():
                loss = cross_entropy(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if trainer.gradient_clip_val:
                nn.utils.clip_grad_norm_(net.parameters(), trainer.gradient_clip_val)
            optimizer.step()
            yield


def read_clock(device: torch.device) -> float:
    """Return the time in seconds at which the device has finished its work."""
    torch.get_device_module(device).synchronize()
    return perf_counter()


class InterleavedTimer(Callback):
    """Interrupt a fit every WARMUP + TIMED steps for as many of `train_bare`; measure the seconds of TIMED steps."""

    def __init__(self) -> None:
        self.seconds: list[float] = []  # per turn of the fit
        self.bare_seconds: list[float] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.bare, self.data = train_bare(trainer), trainer.datamodule

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        turn, step = divmod(trainer.global_step, WARMUP + TIMED)
        if step == WARMUP:
            self.started_at = read_clock(pl_module.device)
        elif step == 0:
            if turn:
                self.seconds.append(read_clock(pl_module.device) - self.started_at)
            for bare_step in range(WARMUP + TIMED):
                if bare_step == WARMUP:
                    started_at = read_clock(pl_module.device)
                next(self.bare)
            self.bare_seconds.append(read_clock(pl_module.device) - started_at)


def compare_with_bare_loop(overrides: list[str], rounds: int) -> None:
    """Print the images per second of src.train and of a bare loop, and their ratio."""
    if "soft_labels" in compose(overrides).data:
        raise UserError("data.soft_labels: the bare loop has no distillation; add data=mnist")
    timer, steps = InterleavedTimer(), (WARMUP + TIMED) * rounds + 1  # the last step ends the last turn
    options = f"trainer.max_steps={steps}", "trainer.max_epochs=-1", "trainer.accumulate_grad_batches=1", "test=false"
    results = train_run([*overrides, *options], timer)
    own, bare = np.array(timer.seconds), np.array(timer.bare_seconds[:rounds])
    images = TIMED * rounds * timer.data.train_batch_size
    print(f"{results['data']}, {results['device']}, batch {timer.data.train_batch_size}")
    print(f"src.train  {images / own.sum():8,.0f} images/s")
    print(f"bare loop  {images / bare.sum():8,.0f} images/s")
    print(f"ratio      {bare.sum() / own.sum():8.3f} ± {sem(bare / own):.3f}")


def time_experiment(name: str, overrides: list[str], seeds: range) -> Iterator[tuple[float, float]]:
    """Train with each seed; yield the seconds and the test accuracy in percent."""
    for seed in seeds:
        results = train_run([*overrides, f"seed={seed}"])
        seconds, accuracy = results["seconds"]["fit"], 100 * results["metrics"]["test/acc"]
        print(f"{name}  seed {seed}  {accuracy:.2f}% at the end, {seconds:.1f} s", flush=True)
        yield seconds, accuracy


def time_baseline(data: Any, target: float, seed: int) -> Iterator[float]:
    """Train the baseline until it has `target` percent test accuracy; yield the seconds of each epoch."""
    torch.manual_seed(seed)
    net = CNN(dropout=0.25).to(data.device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    convert = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])

    def collate(samples: list[tuple[Any, int]]) -> tuple[Tensor, Tensor]:
        """Do what torchvision.datasets.MNIST does per image: convert to PIL, to a tensor, normalise."""
        images = torch.stack([convert(Image.fromarray(pixels[0])) for pixels, _ in samples])
        return images.to(data.device), torch.tensor([label for _, label in samples], device=data.device)

    train_images, train_labels = (tensor.cpu().numpy() for tensor in data.splits.train[:])
    samples: Any = list(zip(train_images, train_labels, strict=True))
    loader = DataLoader(samples, batch_size=128, shuffle=True, collate_fn=collate)
    seconds: list[float] = []
    for epoch in range(BASELINE_EPOCHS):
        torch.manual_seed(hash_seed(seed, epoch))  # the runs between the epochs draw numbers as well
        started_at = read_clock(data.device)
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
        seconds.append(read_clock(data.device) - started_at)
        net.eval()
        with torch.no_grad():
            is_right = [net(data.spec.normalize(x)).argmax(1) == y for x, y in data.raw_batches("test")]
        accuracy = 100 * torch.cat(is_right).float().mean().item()
        net.train()
        yield seconds[-1]
        if accuracy >= target:
            break
    print(f"baseline  seed {seed}  {accuracy:.2f}% after {len(seconds)} epochs, {sum(seconds):.1f} s", flush=True)


def compare_times(target: float, overrides: list[str], seeds: int, baseline_seeds: int) -> None:
    """Print how much longer the baseline, which sees all images, takes to `target` percent than a run to its end."""
    silence_routine_output()
    config = compose([*overrides, "data.train_size=null"])
    data = instantiate_node("data", config.data)
    data.trainer = instantiate_node("trainer", config.trainer, callbacks=[], logger=False)  # knows the device
    data.prepare_data()
    data.setup()
    if "soft_labels" in config.data:
        overrides = [*overrides, "data.soft_labels.folder='${output_dir}/soft_labels'"]
    experiment = time_experiment(config.name, overrides, range(config.seed, config.seed + seeds))
    baselines = [time_baseline(data, target, config.seed + i) for i in range(baseline_seeds)]
    turns = itertools.zip_longest(experiment, *baselines)
    runs, *epochs = ([x for x in column if x is not None] for column in zip(*turns, strict=True))
    seconds, accuracies = np.array(runs).T
    baseline_seconds = np.array([sum(times) for times in epochs])
    low, high = t.interval(0.95, seeds - 1, accuracies.mean(), sem(accuracies))
    score = f"{accuracies.mean():.2f} ± {accuracies.std(ddof=1):.2f}%, 95% CI of the mean {low:.3f} to {high:.3f}%"
    print(f"{config.name}  {score}, {seconds.mean():.1f} s")
    ratio = baseline_seconds.mean() / seconds.mean()
    # The relative errors of the two means add in squares.
    error = ratio * np.hypot(sem(baseline_seconds) / baseline_seconds.mean(), sem(seconds) / seconds.mean())
    print(f"baseline  {baseline_seconds.mean():.1f} s\nratio  {ratio:.1f} ± {error:.1f}")
