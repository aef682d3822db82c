"""Data sets, each with `download(root)`, which fetches what is missing or raises UserError, and `load(root)`."""

import hashlib
import os
import socket
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset, Subset
from torchvision import datasets

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, PositiveInt, Probability
from src.data.preprocess import SUFFIXES, count_channels, resize_image

TIMEOUT = 10.0  # seconds without an answer after which a download fails
MNIST_FILES = {  # in root/MNIST/raw, with their SHA-256
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class LabeledImages(NamedTuple):
    """Images with their labels, in memory."""

    images: Tensor  # [N, C, H, W], uint8
    labels: Tensor  # [N], int64


class DatasetSplits(NamedTuple):
    """Images in memory, or as a Dataset of pairs: a [C, H, W] uint8 image and its label."""

    name: str
    classes: tuple[str, ...]
    train: LabeledImages | Dataset
    test: LabeledImages | Dataset
    val: LabeledImages | Dataset | None = None  # held out of `train` by the data module


class MNIST:
    """The official 60,000 training and 10,000 test images, verified by their checksums."""

    def download(self, root: Path) -> None:
        fix = "set data.root or MNIST_ROOT to a folder that has MNIST/raw/, or train on data=digits"
        if not has_mnist(root):
            download_once("MNIST", root, lambda folder: datasets.MNIST(folder, download=True), _verify_mnist, fix)

    def load(self, root: Path) -> DatasetSplits:
        _verify_mnist(root)
        splits = (datasets.MNIST(root, train=is_train) for is_train in (True, False))
        train, test = (LabeledImages(split.data.unsqueeze(1), split.targets) for split in splits)
        return DatasetSplits("mnist", tuple("0123456789"), train, test)


class Digits:
    """scikit-learn's 1,797 digits in MNIST's format, 20×20 in the middle of 28×28; a fixed fifth is for the test."""

    def download(self, root: Path) -> None: ...

    def load(self, root: Path) -> DatasetSplits:
        package = find_spec("sklearn")  # only its file is needed, and importing it takes a second
        assert package and package.origin
        file = Path(package.origin).with_name("datasets") / "data/digits.csv.gz"
        rows = torch.from_numpy(np.loadtxt(file, delimiter=","))
        images = rows[:, :64].float().view(-1, 1, 8, 8) * (255 / 16)
        images = pad(interpolate(images, size=(20, 20), mode="bilinear", align_corners=False), (4, 4, 4, 4))
        images, labels = images.round().to(torch.uint8), rows[:, 64].long()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        train, test = (LabeledImages(images[indices], labels[indices]) for indices in order.split(1437))
        return DatasetSplits("digits", tuple("0123456789"), train, test)


class MNISTOrDigits:
    """MNIST if it is on disk or can be downloaded, otherwise the digits, with a warning."""

    def download(self, root: Path) -> None:
        try:
            MNIST().download(root)
        except UserError as error:
            warnings.warn(f"training on scikit-learn's small digits: {error}", stacklevel=2)

    def load(self, root: Path) -> DatasetSplits:
        return (MNIST() if has_mnist(root) else Digits()).load(root)


class TorchvisionDataset:
    """A class of torchvision.datasets with a training and a test split, downloaded once.

    Images are resized to `size` × `size` pixels; None keeps their size. `options` are arguments of the class itself.
    """

    def __init__(self, name: NonEmptyStr, size: PositiveInt | None = None, **options: Any) -> None:
        self.name, self.size, self.options = name, size, options
        self.dataset_class: Any = getattr(datasets, name, None)
        parameters = signature(self.dataset_class).parameters if isinstance(self.dataset_class, type) else {}
        if not {"train", "split"} & parameters.keys():
            raise UserError(f"data.dataset.name={name}: no such data set with a test split in torchvision.datasets")
        has_flag = "train" in parameters or "split" in options  # EMNIST has `train`, and its `split` is something else
        self.splits: Any = [{"train": x} if has_flag else {"split": "train" if x else "test"} for x in (True, False)]

    def _open(self, root: Path, **arguments: Any) -> list[Any]:
        try:
            return [self.dataset_class(root, **split, **self.options, **arguments) for split in self.splits]
        except (TypeError, ValueError) as error:
            raise UserError(f"data.dataset: {self.name}: {error}") from error

    def download(self, root: Path) -> None:
        try:
            self._open(root)
        except (RuntimeError, OSError):
            fix = "set data.root to the folder that has it"
            download_once(self.name, root, partial(self._open, download=True), self._open, fix)

    def load(self, root: Path) -> DatasetSplits:
        train, test = self._open(root)
        first = train[0][0]
        shape = count_channels(first), *((self.size, self.size) if self.size else (first.height, first.width))
        train.transform = test.transform = partial(resize_image, shape=shape)
        labels = getattr(train, "targets", getattr(train, "labels", None))
        labels = (train[i][1] for i in range(len(train))) if labels is None else labels
        classes = getattr(train, "classes", None) or range(1 + max(map(int, labels)))
        return DatasetSplits(self.name.lower(), tuple(map(str, classes)), train, test)


class ImageFolder:
    """Image files of any size, one folder per class, below root/train and root/test or below root itself.

    Without root/test, `test_size` is the fraction of images drawn for the test, the same ones every time. The middle
    square is resized to `size` × `size` pixels. `channels` is 1 for grey, 3 for colour, None for what the files have.
    """

    def __init__(
        self, size: PositiveInt = 32, channels: PositiveInt | None = None, test_size: Probability = 0.2
    ) -> None:
        self.size, self.channels, self.test_size = size, channels, test_size

    def download(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; set data.root to a folder with one folder of images per class")

    def load(self, root: Path) -> DatasetSplits:
        has_test = (root / "train").is_dir() and (root / "test").is_dir()
        try:
            folders = [root / "train", root / "test"] if has_test else [root]
            opened = [datasets.ImageFolder(x, is_valid_file=lambda x: x.lower().endswith(SUFFIXES)) for x in folders]
        except OSError as error:
            raise UserError(_first_line(error)) from error
        classes, files = opened[0].classes, [Path(file) for file, _ in opened[0].samples]
        if opened[-1].classes != classes or len(classes) < 2:
            raise UserError(f"{root}: needs one folder for each of at least two classes, the same in train and test")
        channels = self.channels or max(map(count_channels, files[:: max(1, len(files) // 100)]))
        for split in opened:
            split.loader = partial(_load_image, shape=(channels, self.size, self.size))
        splits: list[Dataset] = [*opened]
        if not has_test:
            order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0)).tolist()
            count = max(1, round(self.test_size * len(files)))
            splits = [Subset(opened[0], sorted(indices)) for indices in (order[count:], order[:count])]
        return DatasetSplits(root.resolve().name, tuple(classes), *splits)


class NpzFile:
    """An .npz file with train_images, train_labels, test_images, test_labels, or x_train, y_train, x_test, y_test.

    Images are uint8, [N, H, W] or [N, H, W, C]; labels are integers from 0; `classes` may hold their names.
    """

    def download(self, root: Path) -> None:
        if not root.is_file():
            raise UserError(f"{root}: no such file; set data.root to an .npz file")

    def load(self, root: Path) -> DatasetSplits:
        needed = "train_images", "train_labels", "test_images", "test_labels"
        try:
            with np.load(root, allow_pickle=False) as file:
                names = ("x_train", "y_train", "x_test", "y_test") if "x_train" in file else needed
                images, labels = ([torch.from_numpy(file[name]) for name in names[start::2]] for start in (0, 1))
                count = 1 + max(int(split.max()) for split in labels)
                classes = tuple(map(str, file["classes"] if "classes" in file else range(count)))
            for x, y in zip(images, labels, strict=True):
                if x.dtype != torch.uint8 or x.ndim not in (3, 4) or x.shape[1:] != images[0].shape[1:]:
                    raise ValueError(f"images of {x.dtype}, {list(x.shape)}")
                if y.is_floating_point() or y.numel() != len(x) or y.min() < 0 or count > len(classes):
                    raise ValueError(f"labels of {y.dtype}, {list(y.shape)}, {len(classes)} classes")
        except (OSError, ValueError, KeyError, BadZipFile, TypeError, AttributeError, RuntimeError) as error:
            form = "uint8 images [N, H, W] or [N, H, W, C], integer labels ≥ 0"
            raise UserError(f"{root}: {_first_line(error)}; it needs {', '.join(needed)}: {form}") from error
        images = [x[:, None] if x.ndim == 3 else x.permute(0, 3, 1, 2).contiguous() for x in images]
        train, test = map(LabeledImages, images, [y.flatten().long() for y in labels])
        return DatasetSplits(root.stem, classes, train, test)


def load_into_memory(split: LabeledImages | Dataset) -> LabeledImages:
    """Read every image of a split."""
    if isinstance(split, LabeledImages):
        return split
    images, labels = zip(*(split[i] for i in range(len(split))), strict=True)  # type: ignore[arg-type]
    return LabeledImages(torch.stack(images), torch.tensor(labels))


def has_mnist(root: Path) -> bool:
    """Return whether MNIST's four files exist."""
    return all((root / "MNIST/raw" / name).is_file() for name in MNIST_FILES)


def _verify_mnist(root: Path) -> None:
    for name, checksum in MNIST_FILES.items():
        file = root / "MNIST/raw" / name
        if hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
            others = "for other images of this format use data=fashion or data=kmnist"
            raise UserError(f"{file}: damaged or not MNIST's (its SHA-256 differs); delete it to download it; {others}")


def download_once(name: str, root: Path, fetch: Callable[[Path], Any], verify: Callable[[Path], Any], fix: str) -> None:
    """Let `fetch` download into `root`, once even if several processes start together.

    `verify` raises an error unless a folder has the data. A failed download leaves nothing behind and raises UserError.
    """
    created = [folder for folder in (root, *root.parents) if not folder.exists()]
    lock, timeout = root / f".{name.lower()}.lock", socket.getdefaulttimeout()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock), tempfile.TemporaryDirectory(dir=root, prefix=".download-") as folder:
            with suppress(RuntimeError, OSError, UserError):
                return verify(root)  # another process has downloaded it
            socket.setdefaulttimeout(TIMEOUT)
            fetch(Path(folder))
            verify(Path(folder))
            for file in filter(Path.is_file, Path(folder).rglob("*")):
                target = root / file.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
    except (RuntimeError, OSError, UserError) as error:  # torchvision raises RuntimeError if every mirror has failed
        with suppress(OSError):  # a folder that is not empty stays
            lock.unlink(missing_ok=True)
            for path in created:
                path.rmdir()
        reason = _first_line(error).partition(";")[0]
        raise UserError(f"{name} is not in {root} and could not be downloaded ({reason}); {fix}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(":.") if str(error) else type(error).__name__


def _load_image(file: str, shape: tuple[int, int, int]) -> Tensor:
    try:
        return resize_image(Path(file), shape)
    except UserError as error:
        raise UserError(f"{file}: {error}; fix or remove it") from error
