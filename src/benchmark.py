"""Speed of training, as ratios of runs made alternately: python -m src.benchmark [key=value ...]

a  a bare PyTorch loop over the same data in memory, with the same network, augmentation and optimizer: the limit
b  python -m src.train: the same through Lightning, with its logging
c  the source's pipeline: torchvision's transforms image by image in a DataLoader, and the default memory layout

Each is timed over the same number of batches, in turn, so that a noisy machine is noisy for all of them.

--time-to 99.4 is the longer mode: `experiment=fast` is trained to its end, and c with the source's recipe until it
first has so many percent of the test images right, scored after each epoch; scoring is not timed.
"""

import argparse
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import hydra
import lightning as L
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src import arguments, cli
from src.callbacks.console import quiet
from src.config import CONF, check
from src.data.batches import generator_for
from src.data.mnist import DigitImages
from src.data.normalize import MEAN, STD, normalize
from src.data.sources import Images
from src.errors import UserError
from src.models.cnn import CNN
from src.process import keep_freed_memory

WARM_UP = 5  # batches before the clock starts


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PerImage(Dataset):
    """What torchvision.datasets.MNIST does with each image: to a PIL image, to a tensor, normalised."""

    def __init__(self, images: Images) -> None:
        self.images = Images(images.images.cpu(), images.labels.cpu())
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.images[index, 0].numpy())
        return self.transform(image), int(self.images.labels[index])


def time_loop(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Any],
    count: int,
    device: torch.device,
    clip: float | None,
    warm_up: int = WARM_UP,
) -> float:
    """Seconds for `count` batches after the warm-up; `batches` starts an epoch."""
    net.train()
    seen, started = 0, perf_counter()
    while True:
        for images, labels in batches():
            if seen == warm_up:
                synchronize(device)
                started = perf_counter()
            loss = nll_loss(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            seen += 1
            if seen == warm_up + count:
                synchronize(device)
                return perf_counter() - started


def bare(cfg: DictConfig, data: DigitImages, count: int, device: torch.device) -> float:
    net = instantiate(cfg.model).to(device)
    optimizer = instantiate(cfg.optimizer)(net.parameters())
    step = 0

    def batches() -> Any:
        nonlocal step
        for images, labels in data.train_dataloader():
            if data.augment:
                images = data.augment(images.float(), generator_for(cfg.seed, step, 0, device=device))
            step += 1
            yield normalize(images), labels

    return time_loop(net, optimizer, batches, count, device, cfg.trainer.gradient_clip_val)


def batch_size_of(data: DigitImages) -> int:
    return data.train_dataloader().sampler.global_batch_size  # type: ignore[attr-defined]


class Stopwatch(Callback):
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == WARM_UP:
            synchronize(pl_module.device)
            self.started = perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        synchronize(pl_module.device)
        self.seconds = perf_counter() - self.started


@contextmanager
def fitted(cfg: DictConfig, data: DigitImages, *further: Callback, **settings: Any) -> Iterator[L.Trainer]:
    """Trains as src.train does, without printing or validating; the run folder is gone afterwards."""
    module = instantiate(
        cfg.module,
        net=instantiate(cfg.model),
        optimizer=instantiate(cfg.optimizer),
        scheduler=instantiate(cfg.scheduler),
    )
    silent = "layers", "progress", "best"  # they print, or need a validation
    settings = {"limit_val_batches": 0, "enable_progress_bar": False, **settings}
    with tempfile.TemporaryDirectory() as folder:
        cfg.output_dir = folder
        callbacks = [instantiate(c) for name, c in cfg.callbacks.items() if c and name not in silent]
        trainer = instantiate(cfg.trainer, callbacks=[*callbacks, *further], logger=instantiate(cfg.logger), **settings)
        trainer.fit(module, data)
        yield trainer


def ours(cfg: DictConfig, data: DigitImages, count: int, device: torch.device) -> float:
    stopwatch = Stopwatch()
    with fitted(cfg, data, stopwatch, limit_train_batches=WARM_UP + count, max_epochs=1):
        return stopwatch.seconds


def source_parts(
    data: DigitImages, batch_size: int, device: torch.device
) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    assert data.sets is not None
    net = CNN(dropout=0.25).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    return net, optimizer, DataLoader(PerImage(data.sets.train), batch_size=batch_size, shuffle=True)


def source(cfg: DictConfig, data: DigitImages, count: int, device: torch.device) -> float:
    net, optimizer, loader = source_parts(data, batch_size_of(data), device)
    return time_loop(
        net, optimizer, lambda: ((x.to(device), y.to(device)) for x, y in loader), count, device, clip=None
    )


def pipeline_share(cfg: DictConfig, data: DigitImages, count: int, device: torch.device) -> float:
    """Seconds that loading, augmenting and normalising `count` batches take by themselves."""
    started = perf_counter()
    for step, (images, _) in zip(range(count), data.train_dataloader(), strict=False):
        if data.augment:
            images = data.augment(images.float(), generator_for(cfg.seed, step, 0, device=device))
        normalize(images)
    synchronize(device)
    return perf_counter() - started


def speed(cfg: DictConfig, data: DigitImages, batches: int, rounds: int, device: torch.device) -> None:
    runs = {"a": bare, "b": ours, "c": source}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    shares = []
    for _ in range(rounds):
        for name, run in runs.items():
            seconds[name].append(run(cfg, data, batches, device))
        shares.append(pipeline_share(cfg, data, batches, device) / seconds["b"][-1])
    for name in runs:
        print(f"{name}    {batches * batch_size_of(data) / statistics.median(seconds[name]):8,.0f} images/s")
    for name, over in ("b/a", "a"), ("b/c", "c"):
        ratios = [other / own for own, other in zip(seconds["b"], seconds[over], strict=True)]
        print(f"{name}  {statistics.median(ratios):8.3f}  ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"the data pipeline takes {100 * statistics.median(shares):.1f} % of a step of b")


def fast(cfg: DictConfig, data: DigitImages) -> tuple[float, float]:
    """Seconds that `experiment=fast` trains, and the percent of the test images that it then reads."""
    started = perf_counter()
    with fitted(cfg, data) as trainer:
        seconds = perf_counter() - started
        return seconds, 100 * trainer.test(trainer.lightning_module, data, verbose=False)[0]["test/acc"]


def source_to(target: float, data: DigitImages, device: torch.device) -> tuple[float, float, int]:
    """Seconds of training, percent and epochs when c reaches `target` percent, or those of its 19 epochs."""
    assert data.sets is not None
    net, optimizer, loader = source_parts(data, 128, device)
    seconds, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < target and epoch < 19:
        seconds += time_loop(
            net,
            optimizer,
            lambda: ((x.to(device), y.to(device)) for x, y in loader),
            len(loader),
            device,
            clip=None,
            warm_up=0,
        )
        epoch += 1
        net.eval()
        with torch.no_grad():
            right = sum(int((net(normalize(x)).argmax(1) == y).sum()) for x, y in data.test_dataloader())
        accuracy = 100 * right / len(data.sets.test.labels)
    return seconds, accuracy, epoch


def time_to(target: float, cfg: DictConfig, data: DigitImages, rounds: int, device: torch.device) -> None:
    accuracies, ratios = [], []
    for seed in range(cfg.seed, cfg.seed + rounds):
        cfg.seed = data.seed = seed
        L.seed_everything(seed, verbose=False)
        own, accuracy = fast(cfg, data)
        print(f"b  seed {seed}  {accuracy:.2f} % at the end, {own:.1f} s", flush=True)
        accuracies.append(accuracy)
        L.seed_everything(seed, verbose=False)
        other, accuracy, epochs = source_to(target, data, device)
        print(f"c  seed {seed}  {accuracy:.2f} % after {epochs} epochs, {other:.1f} s", flush=True)
        ratios.append(other / own)
    print(f"b    {statistics.mean(accuracies):.2f} % on average  ({min(accuracies):.2f} to {max(accuracies):.2f})")
    print(f"c/b  {statistics.median(ratios):.1f}  ({min(ratios):.1f} to {max(ratios):.1f})")


def count(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


@arguments.entry
def main() -> None:
    parser = arguments.Parser(
        prog="python -m src.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=count, default=400, help="timed batches a run (default: 400)")
    parser.add_argument("--rounds", type=count, default=3, help="how often each is timed (default: 3)")
    parser.add_argument("--time-to", type=float, metavar="PERCENT", help="the longer mode")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as for python -m src.train")
    chosen = parser.parse_intermixed_args()
    quiet()
    keep_freed_memory()
    warnings.filterwarnings("ignore", message=".*val_dataloader")
    experiment = ["experiment=fast"] if chosen.time_to else []
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", overrides=[*experiment, *chosen.overrides, "output_dir=."])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(cli.explain(error)) from error
    check(cfg)
    if cfg.data.get("reinforce"):
        raise UserError("the bare loop learns from no teacher; add data=mnist")
    data = instantiate(cfg.data)
    data.trainer = instantiate(cfg.trainer, callbacks=[], logger=False)
    device = data.trainer.strategy.root_device
    data.prepare_data()
    data.setup("fit")
    print(f"{data.name}, {device}, {torch.get_num_threads()} threads, batch {batch_size_of(data)}", flush=True)
    if chosen.time_to:
        time_to(chosen.time_to, cfg, data, chosen.rounds, device)
    elif (WARM_UP + chosen.batches) * batch_size_of(data) > len(data.sets.train.labels):
        raise UserError(f"--batches {chosen.batches}: an epoch of {data.name} has fewer; use a smaller number")
    else:
        speed(cfg, data, chosen.batches, chosen.rounds, device)


if __name__ == "__main__":
    main()
