"""Reading the data sets: MNIST by torchvision, verified; scikit-learn's digits, which need no network."""

import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.datasets import MNIST

from src.errors import UserError


class Images(NamedTuple):
    images: Tensor  # [N, 1, 28, 28], uint8, white on black
    labels: Tensor  # [N], int64, 0 to 9


class Sets(NamedTuple):
    name: str
    train: Images
    test: Images


# The files of MNIST as they lie in `root`/MNIST/raw: size in bytes, SHA-256.
MNIST_FILES = {
    "train-images-idx3-ubyte": (
        47_040_016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        60_008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        7_840_016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        10_008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def has_mnist(root: Path) -> bool:
    """Whether the four files are there; whether they are sound is for `read_mnist` to say."""
    return all((root / "MNIST/raw" / name).is_file() for name in MNIST_FILES)


def download_mnist(root: Path, timeout: float = 10.0) -> None:
    """Fetches MNIST into `root` from torchvision's mirrors unless it is there; `timeout` in seconds of silence.

    Processes that start together download once. The files move into place only when they are whole.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / ".mnist.lock"):
            if has_mnist(root):
                return
            with tempfile.TemporaryDirectory(dir=root, prefix=".mnist-") as folder, _timeout(timeout):
                MNIST(folder, download=True)
                raw = Path(folder, "MNIST/raw")
                for name in MNIST_FILES:
                    _verify(raw / name)
                (root / "MNIST/raw").mkdir(parents=True, exist_ok=True)
                for name in MNIST_FILES:
                    os.replace(raw / name, root / "MNIST/raw" / name)
    except (RuntimeError, OSError) as error:
        # torchvision raises a bare RuntimeError once every mirror has failed.
        reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__
        raise UserError(
            f"MNIST is not in {root} and could not be downloaded ({reason}); "
            "set data.root or MNIST_ROOT to a folder that has MNIST/raw/, or train on data=digits"
        ) from error


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _verify(file: Path) -> None:
    size, digest = MNIST_FILES[file.name]
    fix = "delete it and start again to download it anew"
    try:
        found = file.stat().st_size
        if found != size:
            raise UserError(f"{file} has {found:,} bytes where MNIST's has {size:,}; {fix}")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise UserError(f"{file} is not MNIST's file of that name (its SHA-256 differs); {fix}")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {fix}") from error


def read_mnist(root: Path) -> Sets:
    """The official 60,000 training and 10,000 test images. Raises UserError for a file that is not MNIST's."""
    for name in MNIST_FILES:
        _verify(root / "MNIST/raw" / name)
    train, test = MNIST(root, train=True), MNIST(root, train=False)
    return Sets(
        "mnist",
        Images(train.data.unsqueeze(1), train.targets),
        Images(test.data.unsqueeze(1), test.targets),
    )


def read_digits() -> Sets:
    """scikit-learn's 1,797 handwritten digits, brought to MNIST's form: 20×20 in the middle of 28×28.

    The split is fixed: 1,437 to train on, 360 to test.
    """
    from sklearn.datasets import load_digits  # here, because MNIST should not wait for scikit-learn

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    images = interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
    images = pad(images, (4, 4, 4, 4)).round().to(torch.uint8)
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return Sets("digits", Images(images[train], labels[train]), Images(images[test], labels[test]))
