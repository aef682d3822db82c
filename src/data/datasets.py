"""Data sets, each with `download(root)`, which fetches what is missing or raises UserError, and `load(root)`."""

import hashlib
import re
import socket
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset
from torchvision import datasets

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, PositiveInt, Probability
from src.data.preprocess import SUFFIXES, list_files, list_folders, resize_image

MNIST_FILES = {  # in root/MNIST/raw, with their SHA-256
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TIMEOUT = 10.0  # seconds without an answer after which a download fails
ARRAYS = "uint8 images of one shape, [N, H, W], [N, H, W, C] or [N, C, H, W], C ≤ 4; an int label per image, 0, 1, 2, …"
SPLIT_FOLDER = re.compile("(train|test|val)(ing|id|idation)?", re.IGNORECASE)


@dataclass(frozen=True)
class LabeledImages(Dataset):
    """Images with their labels; indices, [N], or a slice select a tensor of images and one of labels, in memory."""

    images: Tensor  # [N, C, H, W], uint8; or [N] numbers by which `read_image` returns [C, H, W]
    labels: Tensor  # [N], int64
    read_image: Callable[[int], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Any) -> tuple[Tensor, Tensor]:
        images, labels = self.images[indices], self.labels[indices]
        return torch.stack(list(map(self.read_image, images.tolist()))) if self.read_image else images, labels

    def select(self, indices: Tensor) -> "LabeledImages":
        """Return the images at these indices, without reading them."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


class DatasetSplits(NamedTuple):
    """The splits of a data set; if `val` is None, the data module holds it out of `train`."""

    name: str
    classes: tuple[str, ...]
    train: LabeledImages
    test: LabeledImages
    val: LabeledImages | None = None


class TorchvisionDataset:
    """A class of torchvision.datasets that holds its images as one array, downloaded once: MNIST's relatives, CIFAR."""

    def __init__(self, name: NonEmptyStr) -> None:
        self.name = name
        self.dataset_class = getattr(datasets, name)

    def _open(self, root: Path, **arguments: Any) -> list[Any]:
        """Return the training and the test split."""
        return [self.dataset_class(root, train=is_train, **arguments) for is_train in (True, False)]

    def download(self, root: Path) -> None:
        try:
            self._open(root)
        except Exception:  # whatever is missing, the download says it
            try:
                root.mkdir(parents=True, exist_ok=True)
                with FileLock(root / f".{self.name.lower()}.lock"):  # one of several processes that start together
                    socket.setdefaulttimeout(TIMEOUT)
                    self._open(root, download=True)
            except Exception as error:  # torchvision raises RuntimeError, OSError, or TypeError for others
                reason = f"is not in {root}, or damaged, and could not be downloaded ({shorten(str(error), 200)})"
                fix = f"set data.root to a folder that has {self.name}/raw/, or train on data=digits"
                raise UserError(f"{self.name} {reason}; {fix}") from error
            finally:
                socket.setdefaulttimeout(None)

    def load(self, root: Path) -> DatasetSplits:
        opened = self._open(root)
        splits = [_to_labeled_images(split.data, split.targets) for split in opened]
        classes = getattr(opened[0], "classes", range(1 + int(splits[0].labels.max())))
        return DatasetSplits(self.name.lower(), tuple(map(str, classes)), *splits)


class MNIST(TorchvisionDataset):
    """The official 60,000 training and 10,000 test images, verified by their checksums."""

    def __init__(self) -> None:
        super().__init__("MNIST")

    def load(self, root: Path) -> DatasetSplits:
        for name, checksum in MNIST_FILES.items():
            file = root / "MNIST/raw" / name
            if hashlib.sha256(file.read_bytes()).hexdigest() != checksum:
                fix = "delete it to download it; for other images of this format use data=fashion or data=kmnist"
                raise UserError(f"{file}: damaged or not MNIST's (its SHA-256 differs); {fix}")
        return super().load(root)._replace(classes=tuple("0123456789"))


class Digits:
    """scikit-learn's 1,797 digits in MNIST's format, 20×20 in the middle of 28×28; a fixed fifth is for the test."""

    def download(self, root: Path) -> None: ...

    def load(self, root: Path) -> DatasetSplits:
        package = find_spec("sklearn")  # only its file is needed, and importing it takes a second
        assert package and package.origin
        file = Path(package.origin).with_name("datasets") / "data/digits.csv.gz"
        rows = torch.from_numpy(np.loadtxt(file, delimiter=","))
        images, labels = rows[:, :64].float().view(-1, 1, 8, 8) * (255 / 16), rows[:, 64].long()
        images = pad(interpolate(images, size=(20, 20), mode="bilinear", align_corners=False), (4, 4, 4, 4))
        every = LabeledImages(images.round().to(torch.uint8), labels)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        return DatasetSplits("digits", tuple("0123456789"), *map(every.select, order.split(1437)))


class MNISTOrDigits:
    """MNIST if it is on disk or can be downloaded, otherwise the digits, with a warning."""

    def download(self, root: Path) -> None:
        self.dataset: MNIST | Digits = MNIST()
        try:
            self.dataset.download(root)
        except UserError as error:
            warnings.warn(f"training on scikit-learn's small digits: {error}", stacklevel=2)
            self.dataset = Digits()

    def load(self, root: Path) -> DatasetSplits:
        return self.dataset.load(root)


class ImageFolder:
    """Image files of any size, one folder per class, below root/train, root/val and root/test or below root itself.

    Without root/test, `test_size` is the fraction of the training images that is drawn for the test, the same ones
    every time. The middle square is resized to `size` × `size` pixels. `channels` None means those of the files.
    """

    def __init__(
        self, size: PositiveInt = 32, channels: Literal[1, 3] | None = None, test_size: Probability = 0.2
    ) -> None:
        self.size, self.channels, self.test_size = size, channels, test_size

    def download(self, root: Path) -> None: ...

    def load(self, root: Path) -> DatasetSplits:
        matches = [(SPLIT_FOLDER.fullmatch(folder.name), folder) for folder in list_folders(root)]
        named = {match[1].lower(): folder for match, folder in matches if match and list_files(folder, SUFFIXES)}
        files = {
            part: {x.name: images for x in list_folders(folder) if (images := list_files(x, SUFFIXES))}
            for part, folder in (named or {"train": root}).items()
        }
        classes = tuple(sorted({name for by_class in files.values() for name in by_class}))
        if {*files.get("train", ())} != {*classes} or len(classes) < 2:
            needed = f"needs images ({', '.join(SUFFIXES)}) in folders of two or more classes, all in train/ or itself"
            raise UserError(f"{root}: {needed}; there is {', '.join(classes) or 'none'}")
        if other_files := [file for file in list_files(root) if not file.name.lower().endswith(SUFFIXES)]:
            warnings.warn(f"{root}: left out {len(other_files)} files, as {other_files[0].name}", stacklevel=2)
        every = [file for images in files["train"].values() for file in images]
        some = range(0, len(every), len(every) // 10 + 1)
        channels = self.channels or max(len(_read_file(every, i, (None, 1, 1))) for i in some)
        splits = {}
        for part, by_class in files.items():
            pairs = [(file, classes.index(name)) for name, images in by_class.items() for file in images]
            paths, labels = zip(*pairs, strict=True)
            read = partial(_read_file, paths, shape=(channels, self.size, self.size))
            splits[part] = LabeledImages(torch.arange(len(paths)), torch.tensor(labels), read)
        if "test" not in splits:
            order = stratify(splits["train"].labels, seed=0)
            sizes = [count := max(1, round(self.test_size * len(order))), len(order) - count]
            splits["test"], splits["train"] = (splits["train"].select(x.sort().values) for x in order.split(sizes))
        return DatasetSplits(root.resolve().name, classes, **splits)


class NpzFile:
    """An .npz file with train_images, train_labels, test_images and test_labels.

    It may have val_images and val_labels, and the names of the `classes`.
    """

    def download(self, root: Path) -> None: ...

    def load(self, root: Path) -> DatasetSplits:
        try:
            with np.load(root, allow_pickle=False) as file:
                parts = ["train", "test"] + ["val"] * ("val_images" in file)
                splits = [_to_labeled_images(file[f"{part}_images"], file[f"{part}_labels"]) for part in parts]
                labels = torch.cat([split.labels for split in splits]).unique().tolist()
                classes = tuple(map(str, file["classes"] if "classes" in file else range(len(labels))))
        except Exception as error:  # NumPy raises almost anything for damaged files
            needed = "it needs train_images, train_labels, test_images and test_labels"
            raise UserError(f"{root}: {shorten(str(error), 300)}; {needed}") from error
        shapes = {tuple(split.images.shape[1:]) for split in splits}
        if len(shapes) > 1 or len(labels) < 2 or labels[0] < 0 or labels[-1] >= len(classes):
            found = f"images of {shapes}, labels from {labels[0]} to {labels[-1]} for {len(classes)} classes"
            raise UserError(f"{root}: {found}; they must be {ARRAYS}")
        return DatasetSplits(root.stem, classes, *splits)


def _to_labeled_images(images: Any, labels: Any) -> LabeledImages:
    """Convert arrays of the form that ARRAYS describes."""
    images, labels = np.asarray(images), np.asarray(labels)
    channels = [axis for axis in (3, 1) if images.ndim == 4 and images.shape[axis] <= 4]
    is_valid = images.dtype == np.uint8 and (channels or images.ndim == 3)
    if not is_valid or not np.issubdtype(labels.dtype, np.integer) or labels.size != len(images):
        found = f"images of {images.dtype}, {list(images.shape)}, labels of {labels.dtype}, {list(labels.shape)}"
        raise UserError(f"{found}; they must be {ARRAYS}")
    images = np.moveaxis(images, channels[0], 1) if channels else images[:, None]
    return LabeledImages(torch.tensor(images), torch.from_numpy(labels.astype(np.int64)).flatten())


def stratify(labels: Tensor, seed: int) -> Tensor:
    """Return indices in a random order of which each stretch has the classes in their proportions."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    positions = torch.empty(len(labels))
    for label in labels.unique():
        own = order[labels[order] == label]
        positions[own] = (torch.arange(len(own)) + 0.5) / len(own)
    return positions.argsort(stable=True)


def _read_file(files: Sequence[Path], number: int, shape: tuple[int | None, int, int]) -> Tensor:
    try:
        return resize_image(files[number], shape)
    except UserError as error:
        raise UserError(f"{files[number]}: {error}; fix or remove it") from error
