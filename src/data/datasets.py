"""Data sets, each with `download(root)`, which fetches what is missing or raises UserError, and `load(root)`."""

import hashlib
import socket
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
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
SPLIT_FOLDERS = {  # in any capitals
    **{"train": "train", "training": "train", "test": "test", "testing": "test"},
    **{"val": "val", "valid": "val", "validation": "val", "dev": "val"},
}


class UnreadImages(NamedTuple):
    """Images that are read when they are needed: `read` returns the [C, H, W] uint8 image of an item."""

    read: Callable[[Any], Tensor]
    items: Sequence[Any]


class LabeledImages(NamedTuple):
    """Images with their labels."""

    images: Any  # [N, C, H, W] uint8 in memory, or UnreadImages
    labels: Tensor  # [N], int64

    def select(self, indices: Tensor) -> "LabeledImages":
        """Return the images at these indices."""
        if isinstance(self.images, Tensor):
            return LabeledImages(self.images[indices], self.labels[indices])
        items = [self.images.items[i] for i in indices]
        return LabeledImages(self.images._replace(items=items), self.labels[indices])

    def append(self, other: "LabeledImages") -> "LabeledImages":
        """Return these images and after them the others, which are read in the same way."""
        if isinstance(images := self.images, Tensor):
            images = torch.cat([images, other.images])
        else:
            images = images._replace(items=[*images.items, *other.images.items])
        return LabeledImages(images, torch.cat([self.labels, other.labels]))

    def read(self) -> "LabeledImages":
        """Return the images in memory."""
        if isinstance(self.images, Tensor):
            return self
        return LabeledImages(torch.stack([self.images.read(item) for item in self.images.items]), self.labels)


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

    fix = "set data.root to the folder that has it"

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
            timeout = socket.getdefaulttimeout()
            try:
                root.mkdir(parents=True, exist_ok=True)
                with FileLock(root / f".{self.name.lower()}.lock"):  # one of several processes that start together
                    socket.setdefaulttimeout(TIMEOUT)
                    self._open(root, download=True)
            except (RuntimeError, OSError) as error:  # torchvision raises RuntimeError if every mirror has failed
                reason = f"is not in {root}, or damaged, and could not be downloaded ({_first_line(error)})"
                raise UserError(f"{self.name} {reason}; {self.fix}") from error
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
            images: Any = UnreadImages(partial(_get_image, split), range(len(split)))
            if isinstance(getattr(split, "data", None), Tensor) and not self.size:  # MNIST and data sets of its form
                images = split.data[:, None]
            splits.append(LabeledImages(images, torch.as_tensor(labels)))
        classes = getattr(opened[0], "classes", None) or range(1 + int(splits[0].labels.max()))
        return DatasetSplits(self.name.lower(), tuple(map(str, classes)), *splits)


class MNIST(TorchvisionDataset):
    """The official 60,000 training and 10,000 test images, verified by their checksums."""

    fix = "set data.root or MNIST_ROOT to a folder that has MNIST/raw/, or train on data=digits"

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
        images = rows[:, :64].float().view(-1, 1, 8, 8) * (255 / 16)
        images = pad(interpolate(images, size=(20, 20), mode="bilinear", align_corners=False), (4, 4, 4, 4))
        every = LabeledImages(images.round().to(torch.uint8), rows[:, 64].long())
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
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
        named = [(SPLIT_FOLDERS[x.name.lower()], x) for x in list_folders(root) if x.name.lower() in SPLIT_FOLDERS]
        folders = dict(named or [("train", root)])
        if "train" not in folders or len(folders) < len(named):
            found = ", ".join(folder.name for _, folder in named)
            raise UserError(f"{root}: has {found}; it needs one train/, and may have one test/ and one val/")
        _warn_of_other_files(root, [file for folder in folders.values() for file in list_files(folder)])
        files = {
            part: {x.name: list_files(x, SUFFIXES) for x in list_folders(folder)} for part, folder in folders.items()
        }
        classes = tuple(name for name, images in files["train"].items() if images)
        unknown = [f"{part}/{name}" for part in files for name, x in files[part].items() if x and name not in classes]
        if unknown:
            raise UserError(f"{root}: {unknown[0]} has images and train/ has no such class; rename or remove it")
        if len(classes) < 2:
            needed = f"needs a folder of images ({', '.join(SUFFIXES)}) for each of at least two classes"
            raise UserError(f"{folders['train']}: {needed}; there is {', '.join(classes) or 'none'}")
        every = [file for images in files["train"].values() for file in images]
        channels = self.channels or max(map(count_channels, every[:: max(1, len(every) // 100)]))
        read = partial(_read_file, shape=(channels, self.size, self.size))
        splits = {}
        for part, images in files.items():
            pairs = [(file, label) for label, name in enumerate(classes) for file in images.get(name, [])]
            splits[part] = LabeledImages(UnreadImages(read, [x for x, _ in pairs]), torch.tensor([y for _, y in pairs]))
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
                arrays = [[file[name.format(part)] for name in names] for part in parts]
                splits = [_to_labeled_images(x, y, arrays[0][0].shape[1:]) for x, y in arrays]
                labels = torch.cat([split.labels for split in splits]).unique().tolist()
                classes = tuple(map(str, file["classes"] if "classes" in file else range(len(labels))))
            if len(labels) < 2 or labels[0] < 0 or labels[-1] >= len(classes):
                some = labels if len(labels) < 9 else [*labels[:3], "…", *labels[-3:]]
                raise ValueError(f"labels {', '.join(map(str, some))} for {len(classes)} classes")
        except (OSError, ValueError, KeyError, BadZipFile, TypeError, AttributeError, RuntimeError) as error:
            form = "uint8 images [N, H, W] or [N, H, W, C] of at most 4 channels, labels 0, 1, 2, … without a gap"
            needed = f"train_images, train_labels, test_images, test_labels: {form}, one per image"
            raise UserError(f"{root}: {_first_line(error)}; it needs {needed}") from error
        return DatasetSplits(root.stem, classes, *splits)


def _to_labeled_images(images: Any, labels: Any, shape: tuple[int, ...]) -> LabeledImages:
    channels = [axis for axis in (3, 1) if images.ndim == 4 and images.shape[axis] <= 4]
    if images.dtype != np.uint8 or images.shape[1:] != shape or not (channels or images.ndim == 3):
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


def _read_file(file: Path, shape: tuple[int, int, int]) -> Tensor:
    try:
        return resize_image(file, shape)
    except UserError as error:
        raise UserError(f"{file}: {error}; fix or remove it") from error
