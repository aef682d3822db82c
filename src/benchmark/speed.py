"""The runs that src.benchmark times, and how they take turns."""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
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
from hydra.errors import HydraException
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from src.core.config import CONF, resolve_config, validate_config
from src.core.error_messages import describe_error
from src.core.errors import UserError
from src.core.process import disable_malloc_trimming, resolve_precision
from src.data.datamodule import ImageDataModule
from src.data.datasets import LabeledImages, load_into_memory
from src.data.image_spec import MNIST_MEAN, MNIST_STD
from src.data.sampler import make_generator
from src.models.cnn import CNN
from src.training.console import silence_routine_output
from src.training.instantiate import infer_network_arguments, instantiate_all, instantiate_node, instantiate_task
from src.training.run_record import get_device_name

RUN_IN = 10  # batches at the start of each turn that are not timed: they are slowed down by the turn before


def synchronize(device: torch.device) -> None:
    torch.get_device_module(device).synchronize()


class PerImage(Dataset):
    """What torchvision.datasets.MNIST does with each image: to a PIL image, to a tensor, normalised."""

    def __init__(self, images: LabeledImages) -> None:
        self.images = LabeledImages(images.images.cpu(), images.labels.cpu())
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MNIST_MEAN,), (MNIST_STD,))])

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.images[index, 0].numpy())
        return self.transform(image), int(self.images.labels[index])


def steps(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Callable[[], Iterable[Any]],
    clip: float | None = None,
    context: Callable[[], AbstractContextManager] = nullcontext,
) -> Iterator[None]:
    """Training without end, a batch for each `next`; `batches` starts an epoch; `context` is that of a forward pass."""
    while True:
        for images, labels in batches():
            with context():
                loss = nll_loss(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            yield


def timed(run: Iterator[None], count: int, device: torch.device) -> float:
    """Seconds for `count` steps."""
    synchronize(device)
    started = perf_counter()
    for _ in range(count):
        next(run)
    synchronize(device)
    return perf_counter() - started


def inputs(cfg: DictConfig, data: ImageDataModule, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """An epoch of what the network is trained on, from the same tensors as ours."""
    assert isinstance(data.splits.train, LabeledImages)
    for step, batch in enumerate(data.train_dataloader()):
        images, labels = (part[batch] for part in data.splits.train)
        if data.augment:
            images = data.augment(images.float(), make_generator(cfg.seed, step, 0, device=device))
        yield data.spec.normalize(images), labels


def bare(cfg: DictConfig, data: ImageDataModule, device: torch.device) -> Iterator[None]:
    net = instantiate_node("model", cfg.model, **infer_network_arguments(cfg.model, data.spec)).to(device)
    optimizer = instantiate_node("optimizer", cfg.optimizer)(net.parameters())
    assert data.trainer
    context = data.trainer.precision_plugin.train_step_context
    return steps(net, optimizer, lambda: inputs(cfg, data, device), cfg.trainer.gradient_clip_val, context)


def pipeline(cfg: DictConfig, data: ImageDataModule, device: torch.device) -> Iterator[None]:
    """Loading, augmenting and normalising by themselves."""
    while True:
        for _ in inputs(cfg, data, device):
            yield


def batch_size_of(data: ImageDataModule) -> int:
    return data.train_dataloader().sampler.global_batch_size  # type: ignore[attr-defined]


class Turns(Callback):
    """Holds a fit up after every `RUN_IN + count` batches, for as many steps of each of the others."""

    def __init__(self, others: dict[str, Iterator[None]], count: int, rounds: int) -> None:
        self.others, self.count, self.rounds = others, count, rounds
        self.started = 0.0
        self.seconds: dict[str, list[float]] = {name: [] for name in ("b", *others)}  # of each round

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        turn, step = divmod(trainer.global_step, RUN_IN + self.count)
        if step == 0:
            synchronize(pl_module.device)
            if turn:
                self.seconds["b"].append(perf_counter() - self.started)
            if turn < self.rounds:
                for name, other in self.others.items():
                    timed(other, RUN_IN, pl_module.device)
                    self.seconds[name].append(timed(other, self.count, pl_module.device))
        if step == RUN_IN:
            synchronize(pl_module.device)
            self.started = perf_counter()


@contextmanager
def fitted(cfg: DictConfig, data: ImageDataModule, *further: Callback, **settings: Any) -> Iterator[L.Trainer]:
    """Trains as src.train does, without printing or validating; the run folder is gone afterwards."""
    silent = "model_summary", "progress", "best"  # they print, or need a validation
    settings = {"limit_val_batches": 0, "enable_progress_bar": False, **settings}
    with tempfile.TemporaryDirectory() as folder:
        cfg.output_dir = folder
        own = resolve_config(cfg)
        module, _ = instantiate_task(own, data)
        callbacks = instantiate_all("callbacks", {k: c for k, c in own.callbacks.items() if k not in silent})
        loggers = instantiate_all("logger", own.logger)
        trainer = instantiate_node("trainer", own.trainer, callbacks=[*callbacks, *further], logger=loggers, **settings)
        trainer.fit(module, data)
        yield trainer


def source(
    data: ImageDataModule, batch_size: int, device: torch.device
) -> tuple[nn.Module, DataLoader, Iterator[None]]:
    net = CNN(dropout=0.25).to(device, memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(PerImage(load_into_memory(data.splits.train)), batch_size=batch_size, shuffle=True)
    return net, loader, steps(net, optimizer, lambda: ((x.to(device), y.to(device)) for x, y in loader))


def speed(cfg: DictConfig, data: ImageDataModule, count: int, rounds: int, device: torch.device) -> None:
    *_, other = source(data, batch_size_of(data), device)
    # a comes last, next to b in time.
    others = {"c": other, "data": pipeline(cfg, data, device), "a": bare(cfg, data, device)}
    turns = Turns(others, count, rounds)
    whole = {"max_steps": (RUN_IN + count) * rounds + 1, "max_epochs": -1, "accumulate_grad_batches": 1}
    with fitted(cfg, data, turns, **whole):
        seconds = {name: sum(each) for name, each in turns.seconds.items()}
    for name in "abc":
        print(f"{name}    {count * rounds * batch_size_of(data) / seconds[name]:8,.0f} images/s")
    for name in "ac":
        ratios = [other / own for own, other in zip(turns.seconds["b"], turns.seconds[name], strict=True)]
        error = f" ± {statistics.stdev(ratios) / rounds**0.5:.3f}" if rounds > 1 else ""
        print(f"b/{name}  {seconds[name] / seconds['b']:8.3f}{error}  ({min(ratios):.3f} to {max(ratios):.3f})")
    print(f"the data pipeline takes {100 * seconds['data'] / seconds['b']:.1f} % of a step of b")


def fast(cfg: DictConfig, data: ImageDataModule, seed: int) -> tuple[float, float, float]:
    """Seconds that a recipe trains and is tested, and the percent of the test images that it then reads."""
    cfg.seed = data.seed = seed
    L.seed_everything(seed, verbose=False)
    started = perf_counter()
    with fitted(cfg, data) as trainer:
        trained = perf_counter()
        percent = 100 * trainer.test(trainer.lightning_module, data, verbose=False)[0]["test/acc"]
        return trained - started, perf_counter() - trained, percent


def source_to(target: float, data: ImageDataModule, device: torch.device) -> tuple[float, float, int]:
    """Seconds of training, percent and epochs when c reaches `target` percent, or those of its 19 epochs."""
    net, loader, run = source(data, 128, device)
    seconds, accuracy, epoch = 0.0, 0.0, 0
    while accuracy < target and epoch < 19:
        net.train()
        seconds += timed(run, len(loader), device)
        epoch += 1
        net.eval()
        with torch.no_grad():
            right = sum(int((net(data.spec.normalize(x)).argmax(1) == y).sum()) for x, y in data.raw_batches("test"))
        accuracy = 100 * right / len(load_into_memory(data.splits.test).labels)
    return seconds, accuracy, epoch


@contextmanager
def asked_anew(data: ImageDataModule) -> Iterator[list[float]]:
    """A run without answers of runs before, if it has a teacher; the list gets the seconds that it is asked for."""
    seconds: list[float] = []
    if data.soft_labels is None:
        yield seconds
        return
    kept, view = data.soft_labels.folder, data.soft_labels.prepare_epoch

    def timed_view(*arguments: Any) -> Any:
        started = perf_counter()
        found = view(*arguments)
        seconds.append(perf_counter() - started)
        return found

    with tempfile.TemporaryDirectory() as folder:
        data.epoch_soft_labels, data.soft_labels.folder, data.soft_labels.prepare_epoch = None, Path(folder), timed_view
        yield seconds
        data.soft_labels.folder, data.soft_labels.prepare_epoch = kept, view


def time_to(
    target: float,
    cfg: DictConfig,
    data: ImageDataModule,
    whole: ImageDataModule,
    rounds: int,
    seeds: int,
    device: torch.device,
) -> None:
    first, accuracies = cfg.seed, []
    ratios: dict[str, list[float]] = {"c/b": [], "c/b, answers at hand": []}
    for turn in range(rounds):
        own, asking = [], []
        for seed in range(first + turn * seeds, first + (turn + 1) * seeds):
            with asked_anew(data) as asked:
                seconds, _, accuracy = fast(cfg, data, seed)
            teacher = f", {sum(asked):.1f} s of them for the teacher's answers" if asked else ""
            print(f"b  seed {seed}  {accuracy:.2f} % at the end, {seconds:.1f} s{teacher}", flush=True)
            own.append(seconds)
            asking.append(sum(asked))
            accuracies.append(accuracy)
        L.seed_everything(first + turn, verbose=False)
        other, accuracy, epochs = source_to(target, whole, device)
        print(f"c  seed {first + turn}  {accuracy:.2f} % after {epochs} epochs, {other:.1f} s", flush=True)
        ratios["c/b"].append(other / statistics.mean(own))
        if any(asking):
            ratios["c/b, answers at hand"].append(other / (statistics.mean(own) - statistics.mean(asking)))
    scatter = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
    print(f"b    {statistics.mean(accuracies):.2f}{scatter} %  ({min(accuracies):.2f} to {max(accuracies):.2f})")
    for name, found in ratios.items():
        if found:
            print(f"{name}  {statistics.median(found):.1f}  ({min(found):.1f} to {max(found):.1f})")


def at_once(overrides: list[str], runs: int, environment: dict[str, str] | None = None) -> list[dict[str, Any]]:
    """metrics.json of each of so many runs, started together as a user would start them."""
    with tempfile.TemporaryDirectory() as folder:
        each = [Path(folder, str(run)) for run in range(runs)]
        command = [sys.executable, "-m", "src.train", *overrides]
        started = [
            subprocess.Popen([*command, f"hydra.run.dir={run}"], env=environment, stdout=subprocess.DEVNULL)
            for run in each
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            raise UserError("a run failed; its line stands above")
        return [json.loads((run / "metrics.json").read_text()) for run in each]


def side_by_side(overrides: list[str], rounds: int) -> None:
    """Trains alone and two at once, with the cores divided and with all for each."""
    cores, bare = str(torch.get_num_threads()), {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    ways = {"divided": bare, f"{cores} threads each": {**bare, "OMP_NUM_THREADS": cores}}
    found: dict[tuple[str, int], list[float]] = {}
    for _ in range(rounds):
        for (way, environment), runs in itertools.product(ways.items(), (1, 2)):
            results = at_once([*overrides, "test=false"], runs, environment)
            found.setdefault((way, runs), []).append(sum(result["samples_per_second"] for result in results))
    alone = statistics.mean(found["divided", 1])
    for (way, runs), sums in found.items():
        text = f"{statistics.mean(sums):8,.0f} images/s  {statistics.mean(sums) / alone:5.2f}"
        print(f"{runs} at once, {way:<15}  {text}  ({min(sums):,.0f} to {max(sums):,.0f})")


WAYS: dict[str, list[str]] = {"eager": [], "graph": ["trainer=cuda_graph"]}
LARGE = "data.batch_size=512", "optimizer.lr=0.3"
RECIPES: dict[str, list[str]] = {
    "fast": [],
    "512, 3 epochs": [*LARGE, "trainer.max_epochs=3"],
    "512, 2 epochs": [*LARGE, "trainer.max_epochs=2"],
}


def on_gpu(overrides: list[str], batches: int, rounds: int, seeds: int, runs: int, device: torch.device) -> None:
    """All figures of a GPU, the quick ones first, each printed once it is known."""
    for way, further in WAYS.items():
        print(f"the default recipe, {way}", flush=True)
        cfg = composed([*further, *overrides])
        speed(cfg, prepared(cfg), batches, rounds, device)
    recipe = ["experiment=fast", "callbacks.tensorboard=null", *overrides]
    started = perf_counter()
    data = prepared(composed(recipe))
    synchronize(device)
    print(f"data    {perf_counter() - started:.2f} s to read and to bring to the GPU", flush=True)
    for size, (way, further) in itertools.product((64, 128, 256, 512, 1024, 2048), WAYS.items()):
        turns, data.batch_size = Turns({}, batches, rounds), size
        with fitted(
            composed([*recipe, *further]), data, turns, max_steps=(RUN_IN + batches) * rounds + 1, max_epochs=-1
        ):
            step = sum(turns.seconds["b"]) / (batches * rounds)
        print(f"fast, batch {size:>4}, {way}  {size / step:10,.0f} images/s  {1000 * step:7.3f} ms a step", flush=True)
    for (name, own), (way, further) in itertools.product(RECIPES.items(), WAYS.items()):
        cfg = composed([*recipe, *own, *further])
        data.batch_size = cfg.data.batch_size
        fit, test, percents = zip(*(fast(cfg, data, cfg.seed + turn) for turn in range(seeds)), strict=True)
        scatter = f" ± {statistics.stdev(percents):.2f}" if seeds > 1 else ""
        figures = f"{statistics.mean(percents):.2f}{scatter} %  ({min(percents):.2f} to {max(percents):.2f})"
        seconds = (
            f"{statistics.mean(fit):.2f} s  ({min(fit):.2f} to {max(fit):.2f}), test {statistics.mean(test):.2f} s"
        )
        print(f"{name}, {way}  {figures}  after {seconds}", flush=True)
    for together in (1, *(n for n in (2, 4) if n <= runs)):
        started = perf_counter()
        results = at_once(recipe, together)
        inside = statistics.mean(result["seconds"]["fit"] for result in results)
        print(
            f"{together} at once  {perf_counter() - started:.1f} s as commands, {inside:.1f} s of them fit", flush=True
        )


def composed(overrides: list[str]) -> DictConfig:
    try:
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = hydra.compose("train", overrides=[*overrides, "output_dir=."])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(describe_error(error)) from error
    validate_config(resolve_config(cfg))
    resolve_precision(cfg)
    return cfg


def prepared(cfg: DictConfig) -> ImageDataModule:
    """The data of a config, on its device."""
    data = instantiate_node("data", cfg.data)
    data.trainer = instantiate_node("trainer", cfg.trainer, callbacks=[], logger=False)
    data.prepare_data()
    data.setup("fit")
    return data


def run(chosen: argparse.Namespace) -> None:
    """What the command line has `chosen`."""
    if chosen.side_by_side:
        return side_by_side(chosen.overrides, chosen.rounds or 3)
    silence_routine_output()
    disable_malloc_trimming()
    warnings.filterwarnings("ignore", message=".*val_dataloader")
    named = any(override.startswith("experiment=") for override in chosen.overrides)
    overrides = [*["experiment=fast"] * bool(chosen.time_to and not named), *chosen.overrides]
    cfg = composed(overrides)
    if cfg.data.get("soft_labels") and not chosen.time_to:
        raise UserError("the bare loop learns from no teacher; add data=mnist")
    data = prepared(cfg)
    assert data.trainer
    device = data.trainer.strategy.root_device
    print(f"{data.spec.name}, {get_device_name(device)}, batch {batch_size_of(data)}", flush=True)
    if chosen.time_to:
        whole = prepared(composed([*overrides, "data.train_size=null"]))  # whatever b has, c has all images
        time_to(chosen.time_to, cfg, data, whole, chosen.rounds or 1, chosen.seeds, device)
    elif device.type == "cuda":
        on_gpu(chosen.overrides, chosen.batches, chosen.rounds or 6, chosen.seeds, chosen.runs, device)
    else:
        speed(cfg, data, chosen.batches, chosen.rounds or 20, device)
