"""Where images come from: MNIST, verified; scikit-learn's digits, bundled; torchvision's sets; folders; .npz files.

A source says with `prepare` what has to be fetched into a root folder, and with `read` what is there.
"""

import hashlib
import os
import socket
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Protocol
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


class LabeledImages(NamedTuple):
    images: Tensor  # [N, C, H, W], uint8
    labels: Tensor  # [N], int64


class DatasetSplits(NamedTuple):
    """Each set is in memory, or gives an image of [C, H, W] uint8 and its label for an index."""

    name: str
    classes: tuple[str, ...]
    train: LabeledImages | Dataset
    test: LabeledImages | Dataset


class ImageDataset(Protocol):
    def prepare(self, root: Path) -> None: ...

    def read(self, root: Path) -> DatasetSplits: ...


# The files of MNIST as they lie in `root`/MNIST/raw: size in bytes, SHA-256.
MNIST_FILES = {
    "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}


class MNIST:
    """The official 60,000 training and 10,000 test images.

    Raises UserError where they can neither be found nor downloaded, and for a file that is not MNIST's.
    """

    def prepare(self, root: Path) -> None:
        if not has_mnist(root):
            download_mnist(root)

    def read(self, root: Path) -> DatasetSplits:
        for name in MNIST_FILES:
            _verify(root / "MNIST/raw" / name)
        both = (datasets.MNIST(root, train=train) for train in (True, False))
        train, test = (LabeledImages(part.data.unsqueeze(1), part.targets) for part in both)
        return DatasetSplits("mnist", tuple("0123456789"), train, test)


class Digits:
    """scikit-learn's 1,797 handwritten digits, brought to MNIST's form: 20×20 in the middle of 28×28.

    The split is fixed: 1,437 to train on, 360 to test.
    """

    def prepare(self, root: Path) -> None:
        pass  # they come with scikit-learn

    def read(self, root: Path) -> DatasetSplits:
        found = find_spec("sklearn")  # its file is all that is needed, and to import it takes a second
        assert found and found.origin
        content = np.loadtxt(Path(found.origin).with_name("datasets") / "data/digits.csv.gz", delimiter=",")
        rows = torch.from_numpy(content)
        images = rows[:, :64].float().reshape(-1, 1, 8, 8) * (255 / 16)
        images = interpolate(images, size=(20, 20), mode="bilinear", align_corners=False)
        images = pad(images, (4, 4, 4, 4)).round().to(torch.uint8)
        labels = rows[:, 64].long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        train, test = (LabeledImages(images[part], labels[part]) for part in (order[:1437], order[1437:]))
        return DatasetSplits("digits", tuple("0123456789"), train, test)


class MNISTOrDigits:
    """MNIST where it can be had, else the digits, with a warning."""

    def prepare(self, root: Path) -> None:
        try:
            MNIST().prepare(root)
        except UserError as error:
            warnings.warn(f"training on scikit-learn's small digits: {error}", stacklevel=2)

    def read(self, root: Path) -> DatasetSplits:
        return (MNIST() if has_mnist(root) else Digits()).read(root)


class TorchvisionDataset:
    """A data set of torchvision.datasets whose images have one size, or are brought to `size`; `options` are its own.

    Downloaded once. Raises UserError where that fails, or for a set that has no training and test part.
    """

    def __init__(self, name: NonEmptyStr, size: PositiveInt | None = None, **options: Any) -> None:
        self.name, self.size, self.options = name, size, options
        self.made = getattr(datasets, name, None)
        if not (isinstance(self.made, type) and issubclass(self.made, Dataset)):
            raise UserError(f"name={name}: torchvision.datasets has no such class")
        arguments = signature(self.made).parameters
        if not {"train", "split"} & arguments.keys():
            raise UserError(f"name={name}: torchvision gives it no test part; use data=folder")
        if "download" in options:
            raise UserError("data.dataset.download: what is not there is downloaded in any case; leave it out")
        by_train = "train" in arguments or "split" in options  # as EMNIST's, which names another thing
        self.parts: Any = [{"train": True}, {"train": False}] if by_train else [
            {"split": "train"},
            {"split": "test"},
        ]  # fmt: skip
        self.downloads = "download" in arguments

    def _open(self, root: Path, **further: Any) -> list[Any]:
        assert self.made
        try:
            return [self.made(root, **part, **self.options, **further) for part in self.parts]
        except (TypeError, ValueError) as error:
            raise UserError(f"data.dataset: {self.dataset}: {error}") from error

    def prepare(self, root: Path) -> None:
        try:
            self._open(root)
        except (RuntimeError, OSError) as error:
            if not self.downloads:
                raise UserError(f"{self.dataset} is not in {root} ({_reason(error)}); set data.root") from error
        else:
            return
        with _downloading(self.dataset, root, "set data.root to the folder that has it"):
            self._open(root, download=True)

    def read(self, root: Path) -> DatasetSplits:
        train, test = (_Opened(part, self.size) for part in self._open(root))
        classes = getattr(train.dataset, "classes", None) or range(1 + max(int(label) for label in train.labels()))
        return DatasetSplits(self.dataset.lower(), tuple(map(str, classes)), train, test)


class _Opened(Dataset):
    """A torchvision data set with its pictures as tensors."""

    def __init__(self, dataset: Any, size: int | None) -> None:
        self.dataset, self.size = dataset, size
        first = dataset[0][0]
        self.shape = count_channels(first), *((size, size) if size else (first.height, first.width))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture, label = self.dataset[index]
        return resize_image(picture, self.shape), int(label)

    def labels(self) -> Any:
        known = getattr(self.dataset, "targets", None)
        known = getattr(self.dataset, "labels", None) if known is None else known
        return (self[i][1] for i in range(len(self))) if known is None else known


class ImageFolder:
    """Pictures in a folder a class, of any sizes: below `root`/train and `root`/test, or below `root` itself.

    In the latter case a share of `test_size` is drawn for the test, always the same. Each picture is brought to
    `size` × `size`, cut to its middle square; `channels`: 1 for grey, 3 for colour, None for what the pictures have.
    """

    def __init__(
        self, size: PositiveInt = 32, channels: PositiveInt | None = None, test_size: Probability = 0.2
    ) -> None:
        self.size, self.channels, self.test_size = size, channels, test_size

    def prepare(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; set data.root to one that has a folder of pictures a class")

    def read(self, root: Path) -> DatasetSplits:
        halves = [root / part for part in ("train", "test")]
        apart = all(half.is_dir() for half in halves)
        opened = [_Pictures(folder) for folder in (halves if apart else [root])]
        if len({tuple(part.classes) for part in opened}) > 1:
            raise UserError(f"{root}: train and test have other classes")
        if len(opened[0].classes) < 2:
            raise UserError(f"{root}: a folder for each of at least two classes is needed")
        some = opened[0].samples[:: max(1, len(opened[0]) // 100)]
        channels = self.channels or max(count_channels(Path(file)) for file, _ in some)
        for part in opened:
            part.shape = channels, self.size, self.size
        if apart:
            train, test = opened
        else:
            order = torch.randperm(len(opened[0]), generator=torch.Generator().manual_seed(0)).tolist()
            held_out = max(1, round(self.test_size * len(order)))
            train, test = (Subset(opened[0], sorted(part)) for part in (order[held_out:], order[:held_out]))  # type: ignore[assignment]
        return DatasetSplits(root.resolve().name, tuple(opened[0].classes), train, test)


class _Pictures(datasets.ImageFolder):
    def __init__(self, folder: Path) -> None:
        self.shape: tuple[int, int, int] = (1, 1, 1)
        try:
            super().__init__(str(folder), is_valid_file=lambda file: file.lower().endswith(SUFFIXES))
        except OSError as error:
            raise UserError(_reason(error)) from error

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.samples[index]
        try:
            return resize_image(Path(file), self.shape), label
        except UserError as error:
            raise UserError(f"{file}: {error}; mend it or take it away") from error


class NpzFile:
    """Arrays in one .npz file, `root`: train_images, train_labels, test_images, test_labels, and class names if any.

    Also x_train, y_train, x_test, y_test. Images are uint8, [N, H, W] or [N, H, W, C]; labels are whole numbers from 0.
    The names are in `classes`. Raises UserError for anything else; nothing pickled is read.
    """

    NAMES = ("train_images", "train_labels", "test_images", "test_labels"), ("x_train", "y_train", "x_test", "y_test")

    def prepare(self, root: Path) -> None:
        if not root.is_file():
            raise UserError(f"{root}: no such file; set data.root to an .npz file")

    def read(self, root: Path) -> DatasetSplits:
        try:
            with np.load(root, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
        except (OSError, ValueError, BadZipFile, TypeError, AttributeError) as error:
            raise UserError(f"{root}: not an .npz file of plain arrays ({_reason(error)})") from error
        names = next((names for names in self.NAMES if set(names) <= arrays.keys()), None)
        if names is None:
            raise UserError(f"{root}: has {', '.join(arrays) or 'nothing'}; needed are {', '.join(self.NAMES[0])}")
        train_images, train_labels, test_images, test_labels = (arrays[name] for name in names)
        train, test = self._part(root, train_images, train_labels), self._part(root, test_images, test_labels)
        count = int(max(part.labels.max() for part in (train, test))) + 1
        classes = tuple(map(str, arrays.get("classes", range(count))))
        if len(classes) < count or train.images.shape[1:] != test.images.shape[1:]:
            raise UserError(f"{root}: its parts do not fit together (classes, sizes)")
        return DatasetSplits(root.stem, classes, train, test)

    def _part(self, root: Path, images: np.ndarray, labels: np.ndarray) -> LabeledImages:
        labels = labels.reshape(-1)
        fine = images.dtype == np.uint8 and images.ndim in (3, 4) and len(images) == len(labels) > 0
        if not fine or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise UserError(f"{root}: images must be uint8, [N, H, W] or [N, H, W, C], labels whole numbers from 0")
        tensor = torch.from_numpy(images)
        tensor = tensor[:, None] if images.ndim == 3 else tensor.permute(0, 3, 1, 2).contiguous()
        return LabeledImages(tensor, torch.from_numpy(labels.astype(np.int64)))


def load_into_memory(part: LabeledImages | Dataset) -> LabeledImages:
    """All of a set at once."""
    if isinstance(part, LabeledImages):
        return part
    images, labels = zip(*(part[i] for i in range(len(part))), strict=True)  # type: ignore[arg-type]
    return LabeledImages(torch.stack(images), torch.tensor(labels))


def has_mnist(root: Path) -> bool:
    """Whether the four files are there; whether they are sound is for MNIST.read to say."""
    return all((root / "MNIST/raw" / name).is_file() for name in MNIST_FILES)


def download_mnist(root: Path, timeout: float = 10.0) -> None:
    """Fetches MNIST into `root` from torchvision's mirrors unless it is there; `timeout` in seconds of silence.

    Processes that start together download once. The files move into place only when they are whole.
    """
    fix = "set data.root or MNIST_ROOT to a folder that has MNIST/raw/, or train on data=digits"
    with _downloading("MNIST", root, fix, timeout):
        if has_mnist(root):
            return
        with tempfile.TemporaryDirectory(dir=root, prefix=".mnist-") as folder:
            datasets.MNIST(folder, download=True)
            raw = Path(folder, "MNIST/raw")
            for name in MNIST_FILES:
                _verify(raw / name)
            (root / "MNIST/raw").mkdir(parents=True, exist_ok=True)
            for name in MNIST_FILES:
                os.replace(raw / name, root / "MNIST/raw" / name)


@contextmanager
def _downloading(name: str, root: Path, fix: str, timeout: float = 10.0) -> Iterator[None]:
    """One process at a time; what goes wrong is a UserError that names the fix."""
    before, lock = socket.getdefaulttimeout(), root / f".{name.lower()}.lock"
    made = [folder for folder in (root, *root.parents) if not folder.exists()]
    there = set(root.iterdir()) if root.is_dir() else set()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            socket.setdefaulttimeout(timeout)
            yield
    except (RuntimeError, OSError) as error:
        with suppress(OSError):  # where it came to nothing, nothing stays
            lock.unlink(missing_ok=True)
            begun = [folder for own in set(root.iterdir()) - there for folder in (own, *own.rglob("*"))]
            for folder in [*sorted(begun, reverse=True), *made]:
                folder.rmdir()
        # torchvision raises a bare RuntimeError once every mirror has failed.
        raise UserError(f"{name} is not in {root} and could not be downloaded ({_reason(error)}); {fix}") from error
    finally:
        socket.setdefaulttimeout(before)


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0].rstrip(":.") if str(error) else type(error).__name__


def _verify(file: Path) -> None:
    size, digest = MNIST_FILES[file.name]
    fix = "delete it and start again to download it anew; other images of this layout are data=fashion or kmnist"
    try:
        found = file.stat().st_size
        if found != size:
            raise UserError(f"{file} has {found:,} bytes where MNIST's has {size:,}; {fix}")
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != digest:
                raise UserError(f"{file} is not MNIST's file of that name (its SHA-256 differs); {fix}")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {fix}") from error
