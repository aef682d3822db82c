"""Fixtures that the tests share. Slow imports stand inside them: the xdist controller needs none of them."""

import csv
import gc
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from threads, and CI has two cores
gc.disable()  # until everything is imported; it would find nothing


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use one worker per core, at most four, because each holds PyTorch in memory."""
    return min(4, os.cpu_count() or 1)


def pytest_collection_finish() -> None:
    from tensorboard.summary.writer import event_file_writer

    # Event files of one process and second differ by a counter at the end of their names, and are read in the order of
    # their names, in which 10 would come before 9. Runs in tests are that short.
    event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)
    read_configs_once()
    gc.enable()
    gc.freeze()  # modules live on; no later collection need visit them


def read_configs_once() -> None:
    """Cache the files that Hydra reads: half of the time of a composition, and a test may need ten of them."""
    from hydra._internal.config_repository import ConfigRepository

    read: dict[tuple, bytes] = {}
    load = ConfigRepository.load_config

    def load_config(self: ConfigRepository, config_path: str) -> Any:
        files = [Path(source.path, f"{config_path.removesuffix('.yaml')}.yaml") for source in self.sources]
        key = config_path, *((file, file.stat().st_mtime_ns if file.exists() else 0) for file in files)
        if key not in read:
            read[key] = pickle.dumps(load(self, config_path))
        return pickle.loads(read[key])

    ConfigRepository.load_config = load_config


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run_main(monkeypatch, capfd) -> Iterator[Callable[..., Result]]:
    """Run a main in this process as the shell would; return its exit code and what it printed."""
    from src import train
    from src.core.errors import exit_on_signal

    before = {number: signal.signal(number, exit_on_signal) for number in (signal.SIGINT, signal.SIGTERM)}  # as -m does

    def run(*arguments: object, main: Callable[[], None] = train.main) -> Result:
        monkeypatch.setattr(sys, "argv", ["src/train.py", *map(str, arguments)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        return Result(code, *capfd.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    for handler in [handler for handler in logging.getLogger().handlers if type(handler) is logging.FileHandler]:
        logging.getLogger().removeHandler(handler)  # the last run's log, whose folder may be gone


def train_small(folder: Path, *overrides: str) -> Path:
    """Train a tiny network on a few digits into `folder`, in this process, and return `folder`."""
    from src import train

    place = f"hydra.{'sweep' if '-m' in overrides else 'run'}.dir={folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["src/train.py", *SMALL, *overrides, place])
        try:
            train.main()
        except SystemExit as stop:
            assert not stop.code
    return folder


SMALL = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "trainer.accelerator=cpu", "trainer.max_epochs=2"),
    *("trainer.limit_train_batches=6", "++callbacks.tensorboard=null"),
)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a finished run of two epochs on digits. Read it only; copy it to change anything."""
    return train_small(tmp_path_factory.mktemp("finished") / "run", "name=small")


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory) -> Path:
    """The folder of a finished sweep: two learning rates, two seeds each. Read it only; copy it to change anything."""
    return train_small(tmp_path_factory.mktemp("finished") / "sweep", "-m", "optimizer.lr=0.05,0.2", "seed=0,1")


@pytest.fixture
def mnist_root(tmp_path, monkeypatch) -> Path:
    """A folder in MNIST's layout with 40 training and 20 test images of noise, whose checksums are the known ones."""
    import torch

    from src.data import datasets

    raw = tmp_path / "mnist/MNIST/raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    files = {}
    for split, count in ("train", 40), ("t10k", 20):
        images = torch.randint(256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.arange(count, dtype=torch.uint8) % 10
        header = [n.to_bytes(4, "big") for n in (2051, count, 28, 28)]
        files[f"{split}-images-idx3-ubyte"] = b"".join(header) + images.numpy().tobytes()
        header = [n.to_bytes(4, "big") for n in (2049, count)]
        files[f"{split}-labels-idx1-ubyte"] = b"".join(header) + labels.numpy().tobytes()
    for name, content in files.items():
        (raw / name).write_bytes(content)
    known = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(datasets, "MNIST_FILES", known)
    return tmp_path / "mnist"


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Three classes of 12 images, of several sizes and formats."""
    import numpy as np
    from PIL import Image

    for channel, name in enumerate(("red", "green", "blue")):
        (tmp_path / "colours" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 100, (20 + 3 * i, 30 + i, 3))
            pixels[..., channel] += 120
            suffix = ("png", "jpg", "bmp", "webp")[i % 4]
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"colours/{name}/{i}.{suffix}")
    return tmp_path / "colours"


@pytest.fixture
def real_mnist() -> Path:
    root = os.environ.get("MNIST_ROOT")
    if not root or not Path(root, "MNIST/raw").is_dir():
        pytest.skip("MNIST_ROOT names no folder with the real MNIST")
    return Path(root)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory) -> Path:
    """A file of weights, untrained, of a network of 1,788 parameters."""
    import torch

    from src.models.cnn import CNN
    from tests.specs import MNIST_SPEC

    torch.manual_seed(0)
    model = {"_target_": ".models.cnn.CNN", "channels": [4, 4, 4, 4, 4, 4], "dropout": 0.0}
    net = CNN(model["channels"], model["dropout"])
    file = tmp_path_factory.mktemp("weights") / "small.pt"
    torch.save({"state_dict": net.state_dict(), "model": model, "data": MNIST_SPEC._asdict()}, file)
    return file


@pytest.fixture(scope="module")
def browser():
    """Debian's chromium, once per file, because Playwright's event loop would disturb tests of other files."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        yield (browser := driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]))
        browser.close()


class SimulatedKill(BaseException):
    """End a run as SIGKILL would: nothing is written any more."""


@pytest.fixture
def interrupt_at(monkeypatch):
    """Make the next run stop itself at the start of batch `at`, counted from 0 over all epochs."""
    from src.training.resume import ResumeCheckpoint

    original = ResumeCheckpoint.on_train_batch_start

    def at(batch, how):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.fit_loop.total_batch_idx == batch:
                monkeypatch.setattr(ResumeCheckpoint, "on_train_batch_start", original)
                if how is SimulatedKill:
                    raise SimulatedKill
                os.kill(os.getpid(), how)
            original(self, trainer, *arguments)

        monkeypatch.setattr(ResumeCheckpoint, "on_train_batch_start", on_train_batch_start)

    return at


def run_with_processes(number: int, *arguments: str) -> None:
    """Train, or resume, with `number` processes of torchrun."""
    devices = [] if arguments[0].startswith("resume=") else ["trainer=ddp", f"trainer.devices={number}"]
    torchrun = ["torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
    command = [sys.executable, "-m", *torchrun, "-m", "src.train", *arguments, *devices]
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=300)


def read_outcome(folder: Path) -> dict:
    """Return all that two runs must have in common to be bitwise identical."""
    import torch
    from lightning_utilities.core.apply_func import apply_to_collection
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    outcome: dict[str, Any] = {"metrics": json.loads((folder / "metrics.json").read_text())["metrics"]}
    for name in "last", "best":
        if (file := folder / f"checkpoints/{name}.ckpt").exists():
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            states = {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers")}
            outcome[name] = apply_to_collection(states, torch.Tensor, torch.Tensor.tolist)
    if (folder / "metrics.csv").exists():
        with (folder / "metrics.csv").open(newline="") as stream:
            outcome["rows"] = [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = events.Tags()["scalars"]
    outcome["scalars"] = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
    return outcome
