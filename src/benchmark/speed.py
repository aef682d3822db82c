"""The runs that src.benchmark times, and how they take turns."""

import itertools
import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from scipy.stats import t
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from torchvision import transforms

from src.core.config import CONF, resolve_and_validate
from src.core.process import configure_hardware
from src.core.run_folder import METRICS_FILE, read_metrics
from src.data.sampler import hash_seed
from src.models.cnn import CNN
from src.train import train
from src.training.instantiate import instantiate_node

BASELINE_EPOCHS = 19
QUIET = (  # a run of a multirun prints nothing
    *("hydra.mode=MULTIRUN", "callbacks.progress=null", "callbacks.model_summary=null", "callbacks.best=null"),
    *("trainer.enable_progress_bar=false", "trainer.limit_val_batches=0", "optimized_metric=null"),
)


def compose(overrides: list[str], folder: str = ".") -> DictConfig:
    """Return the checked config of a quiet run of src.train, and make its Hydra config the current one."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("train", [*overrides, *QUIET, f"output_dir={folder}"], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    config = resolve_and_validate(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
    configure_hardware(config)
    return config


def time_experiment(name: str, overrides: list[str], seeds: range) -> Iterator[tuple[float, float, float]]:
    """Train with each seed; yield the seconds, the images per second and the test accuracy in percent."""
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            train(compose([*overrides, f"seed={seed}"], folder))
            results = read_metrics(Path(folder, METRICS_FILE))
        seconds, accuracy = results["seconds"]["fit"], 100 * results["metrics"]["test/acc"]
        print(f"{name}  seed {seed}  {accuracy:.2f}% at the end, {seconds:.1f} s", flush=True)
        yield seconds, results["samples_per_second"], accuracy


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
    synchronize = torch.get_device_module(data.device).synchronize
    seconds: list[float] = []
    accuracy = -math.inf
    while accuracy < target and len(seconds) < BASELINE_EPOCHS:
        torch.manual_seed(hash_seed(seed, len(seconds)))  # the runs between the epochs draw numbers as well
        synchronize()
        started_at = perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(net(images), labels).backward()
            optimizer.step()
        synchronize()
        seconds.append(perf_counter() - started_at)
        net.eval()
        with torch.no_grad():
            is_right = [net(data.spec.normalize(x)).argmax(1) == y for x, y in data.raw_batches("test")]
        accuracy = 100 * torch.cat(is_right).float().mean().item()
        net.train()
        yield seconds[-1]
    print(f"baseline  seed {seed}  {accuracy:.2f}% after {len(seconds)} epochs, {sum(seconds):.1f} s", flush=True)


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean; not a number for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan


def compare_times(target: float, overrides: list[str], seeds: int, baseline_seeds: int) -> None:
    """Print how much longer the baseline, which sees all images, takes to `target` percent than a run to its end."""
    config = compose([*overrides, "data.train_size=null"])
    data = instantiate_node("data", config.data)
    data.trainer = instantiate_node("trainer", config.trainer, callbacks=[], logger=False)  # knows the device
    data.prepare_data()
    data.setup()
    if "soft_labels" in config.data:
        overrides = [*overrides, "data.soft_labels.folder='${output_dir}/soft_labels'"]
    runs_of_experiment = time_experiment(config.name, overrides, range(config.seed, config.seed + seeds))
    baselines = [time_baseline(data, target, config.seed + i) for i in range(baseline_seeds)]
    turns = itertools.zip_longest(runs_of_experiment, *baselines)
    runs, *epochs = ([x for x in column if x is not None] for column in zip(*turns, strict=True))
    seconds, speeds, accuracies = zip(*runs, strict=True)
    baseline_seconds = [sum(times) for times in epochs]
    mean, baseline_mean, accuracy = (statistics.mean(x) for x in (seconds, baseline_seconds, accuracies))
    mean_epochs = statistics.mean(map(len, epochs))
    speed = mean_epochs * len(data.splits.train) / baseline_mean
    print(f"baseline  {mean_epochs:.1f} epochs, {baseline_mean:.1f} s, {speed:,.0f} images/s")
    error = standard_error(accuracies)
    low, high = t.interval(0.95, seeds - 1, accuracy, error)
    score = f"{accuracy:.2f} ± {error * seeds**0.5:.2f}%, 95% CI of the mean {low:.3f} to {high:.3f}%"
    print(f"{config.name}  {score}, {mean:.1f} s, {statistics.mean(speeds):,.0f} images/s")
    # The relative errors of the two means add in squares.
    error = math.hypot(standard_error(baseline_seconds) / baseline_mean, standard_error(seconds) / mean)
    print(f"ratio  {baseline_mean / mean:.1f} ± {error * baseline_mean / mean:.1f}")
