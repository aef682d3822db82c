"""Data sets, each with `download(root)`, which fetches what is missing or raises UserError, and `load(root)`."""

import hashlib
import re
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import Dataset
from torchvision import datasets

from src.core.errors import UserError
from src.core.value_types import NonEmptyStr, PositiveInt, Probability
from src.data.preprocess import SUFFIXES, count_channels, list_files, list_folders, resize_image

MNIST_FILES = {  # in root/MNIST/raw, with their SHA-256
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
TIMEOUT = 10.0  # seconds without an answer after which a download fails
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
        self.splits: Any = [{"train": True}, {"train": False}] if has_flag else [{"split": "train"}, {"split": "test"}]

    def _open(self, root: Path, **arguments: Any) -> list[Any]:
        """Return the training and the test split."""
        try:
            return [self.dataset_class(root, **split, **self.options, **arguments) for split in self.splits]
        except (TypeError, ValueError) as error:
            raise UserError(f"data.dataset: {self.name}: {error}") from error

    def download(self, root: Path) -> None:
        try:
            self._open(root)
        except (RuntimeError, OSError):
            timeout = socket.getdefaulttimeout()
            try:
                root.mkdir(parents=True, exist_ok=True)
                with FileLock(root / f".{self.name.lower()}.lock"):  # one of several processes that start together
                    socket.setdefaulttimeout(TIMEOUT)
                    self._open(root, download=True)
            except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError if every mirror has failed
                reason = f"is not in {root}, or damaged, and could not be downloaded ({_first_line(error)})"
                fix = f"set data.root to a folder that has {self.name}/raw/, or train on data=digits"
                raise UserError(f"{self.name} {reason}; {fix}") from error
            finally:
                socket.setdefaulttimeout(timeout)

    def load(self, root: Path) -> DatasetSplits:
        opened, splits = self._open(root), []
        first = opened[0][0][0]
        shape = count_channels(first), *((self.size, self.size) if self.size else (first.height, first.width))
        for split in opened:
            split.transform = partial(resize_image, shape=shape)
            labels = getattr(split, "targets", getattr(split, "labels", None))
            labels = [split[i][1] for i in range(len(split))] if labels is None else labels
            if isinstance(getattr(split, "data", None), Tensor) and not self.size:  # MNIST and data sets of its form
                splits.append(LabeledImages(split.data[:, None], torch.as_tensor(labels)))
            else:
                read = partial(_get_image, split)
                splits.append(LabeledImages(torch.arange(len(split)), torch.as_tensor(labels), read))
        classes = getattr(opened[0], "classes", None) or range(1 + int(splits[0].labels.max()))
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
        try:
            MNIST().download(root)
        except UserError as error:
            warnings.warn(f"training on scikit-learn's small digits: {error}", stacklevel=2)

    def load(self, root: Path) -> DatasetSplits:
        return (MNIST() if has_mnist(root) else Digits()).load(root)


class ImageFolder:
    """Image files of any size, one folder per class, below root/train, root/val and root/test or below root itself.

    Without root/test, `test_size` is the fraction of the training images that is drawn for the test, the same ones
    every time. The middle square is resized to `size` × `size` pixels. `channels` None means those of the files.
    """

    def __init__(
        self, size: PositiveInt = 32, channels: Literal[1, 3] | None = None, test_size: Probability = 0.2
    ) -> None:
        self.size, self.channels, self.test_size = size, channels, test_size

    def download(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; set data.root to a folder with one folder of images per class")

    def load(self, root: Path) -> DatasetSplits:
        matches = [(SPLIT_FOLDER.fullmatch(folder.name), folder) for folder in list_folders(root)]
        named = {match[1].lower(): folder for match, folder in matches if match and list_files(folder, SUFFIXES)}
        folders = named or {"train": root}
        if "train" not in folders:
            raise UserError(f"{root}: has {', '.join(folders)} and no train/ with images")
        _warn_of_other_files(root, [file for folder in folders.values() for file in list_files(folder)])
        files: dict[str, dict[str, list[Path]]] = {
            part: {x.name: images for x in list_folders(folder) if (images := list_files(x, SUFFIXES))}
            for part, folder in folders.items()
        }
        classes = tuple(files["train"])
        if unknown := [f"{part}/{name}" for part, images in files.items() for name in images if name not in classes]:
            raise UserError(f"{root}: {unknown[0]} has images and train/ has no such class; rename or remove it")
        if len(classes) < 2:
            needed = f"needs a folder of images ({', '.join(SUFFIXES)}) for each of at least two classes"
            raise UserError(f"{folders['train']}: {needed}; there is {', '.join(classes) or 'none'}")
        every = [file for images in files["train"].values() for file in images]
        channels = self.channels or max(map(count_channels, every[:: max(1, len(every) // 100)]))
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
    """An .npz file with train_images, train_labels, test_images, test_labels, or x_train, y_train, x_test, y_test.

    Images are uint8, [N, H, W], [N, H, W, C] or [N, C, H, W]; labels are integers from 0, [N] or [N, 1]. It may have
    val_images and val_labels, or x_val and y_val, and the names of the `classes`.
    """

    def download(self, root: Path) -> None:
        if not root.is_file():
            raise UserError(f"{root}: no such file; set data.root to an .npz file")

    def load(self, root: Path) -> DatasetSplits:
        try:
            with np.load(root, allow_pickle=False) as file:
                names = ("x_{}", "y_{}") if "x_train" in file else ("{}_images", "{}_labels")
                parts = ["train", "test"] + ["val"] * (names[0].format("val") in file)
                splits = [_to_labeled_images(*(file[name.format(part)] for name in names)) for part in parts]
                labels = torch.cat([split.labels for split in splits]).unique().tolist()
                classes = tuple(map(str, file["classes"] if "classes" in file else range(len(labels))))
            if len({split.images.shape[1:] for split in splits}) > 1:
                raise ValueError("the images of its splits differ in shape")
            if len(labels) < 2 or labels[0] < 0 or labels[-1] >= len(classes):
                raise ValueError(f"labels from {labels[0]} to {labels[-1]} for {len(classes)} classes")
        except (OSError, ValueError, KeyError, BadZipFile, TypeError, AttributeError, RuntimeError) as error:
            form = "uint8 images [N, H, W] or [N, H, W, C] with C ≤ 4, two or more labels 0, 1, … without a gap"
            needed = f"train_images, train_labels, test_images, test_labels: {form}, one per image"
            raise UserError(f"{root}: {_first_line(error)}; it needs {needed}") from error
        return DatasetSplits(root.stem, classes, *splits)


def _to_labeled_images(images: Any, labels: Any) -> LabeledImages:
    channels = [axis for axis in (3, 1) if images.ndim == 4 and images.shape[axis] <= 4]
    if images.dtype != np.uint8 or not (channels or images.ndim == 3):
        raise ValueError(f"images of {images.dtype}, {list(images.shape)}")
    if not np.issubdtype(labels.dtype, np.integer) or labels.size != len(images):
        raise ValueError(f"labels of {labels.dtype}, {list(labels.shape)}")
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


def has_mnist(root: Path) -> bool:
    """Return whether MNIST's four files exist."""
    return all((root / "MNIST/raw" / name).is_file() for name in MNIST_FILES)


def _warn_of_other_files(root: Path, files: list[Path]) -> None:
    others = Counter(file.suffix.lower() or "without suffix" for file in files if file.suffix.lower() not in SUFFIXES)
    if others:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        warnings.warn(f"{root}: left out {counts}; files that are read: {', '.join(SUFFIXES)}", stacklevel=2)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(":.") if str(error) else type(error).__name__


def _get_image(dataset: Any, index: int) -> Tensor:
    return dataset[index][0]


def _read_file(files: Sequence[Path], number: int, shape: tuple[int, int, int]) -> Tensor:
    try:
        return resize_image(files[number], shape)
    except UserError as error:
        raise UserError(f"{files[number]}: {error}; fix or remove it") from error
