"""Data sets: loaded, downloaded once, described, trained on, and their errors."""

import gzip
import hashlib
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from src.core.errors import UserError
from src.data.datamodule import ImageDataModule
from src.data.datasets import MNIST, Digits, ImageFolder, MNISTOrDigits, NpzFile, TorchvisionDataset
from src.data.preprocess import resize_image

TINY = "model.channels=[4,4,4,4,4,4]", "trainer.max_epochs=2", "data.batch_size=8", "callbacks.model_summary=null"
CLASSES = "blue", "green", "red"


def make_module(dataset, root, **settings) -> ImageDataModule:
    data = ImageDataModule(dataset, str(root), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_digits_have_the_format_of_mnist():
    splits = Digits().load(Path())
    assert splits.name == "digits" and splits.test.images.shape == (360, 1, 28, 28)
    images = splits.train.images
    assert images.shape == (1437, 1, 28, 28) and images.dtype == torch.uint8 and images.max() == 255
    assert images[:, :, :4].max() == 0 and set(splits.train.labels.tolist()) == set(range(10))


@pytest.mark.mnist
def test_real_mnist_loads(real_mnist):
    splits = MNIST().load(real_mnist)
    assert splits.train.images.shape == (60_000, 1, 28, 28) and splits.test.labels.shape == (10_000,)
    assert splits.train.images.float().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)


@pytest.fixture
def mirror(mnist_root, tmp_path, monkeypatch):
    """Serve the files of `mnist_root` as torchvision's mirrors do; yield the list of requests."""
    resources, requests = [], []
    (tmp_path / "mirror").mkdir()
    for file in (mnist_root / "MNIST/raw").iterdir():
        packed = gzip.compress(file.read_bytes())
        (tmp_path / f"mirror/{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "mirror")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    yield requests
    server.shutdown()


def test_several_threads_download_once(mirror, mnist_root, tmp_path):
    MNIST().download(tmp_path / "alone")
    expected, root = len(mirror), tmp_path / "new"
    threads = [threading.Thread(target=MNIST().download, args=(root,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mirror) == 2 * expected
    assert torch.equal(MNIST().load(root).train.images, MNIST().load(mnist_root).train.images)


@pytest.fixture
def no_network(monkeypatch):
    for dataset in torchvision.datasets.MNIST, torchvision.datasets.KMNIST:
        monkeypatch.setattr(dataset, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: nothing listens


@pytest.mark.parametrize(
    "dataset, fix", [(MNIST(), "MNIST/raw/.* data=digits"), (TorchvisionDataset("KMNIST"), r"set data\.root")]
)
def test_failed_download_names_the_fix(no_network, tmp_path, dataset, fix):
    with pytest.raises(UserError, match=f"could not be downloaded .*{fix}"):
        dataset.download(tmp_path / "not/there")


def test_auto_without_network_warns_and_loads_digits(no_network, tmp_path):
    with pytest.warns(UserWarning, match="small digits"):
        data = make_module(MNISTOrDigits(), tmp_path)
    assert data.spec.name == "digits" and len(data.train_dataloader().dataset) == 1437 - 143
    with warnings.catch_warnings(action="error"):
        data.prepare_data()  # as Lightning does again before the test


def test_auto_with_mnist_on_disk_loads_mnist(mnist_root):
    with warnings.catch_warnings(action="error"):
        assert make_module(MNISTOrDigits(), mnist_root, val_size=0).spec.name == "mnist"


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: content[:-1] + b"?"])
def test_damaged_mnist_file_is_named(mnist_root, no_network, damage):
    file = mnist_root / "MNIST/raw/t10k-images-idx3-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"MNIST is not in .*, or damaged|t10k-images-idx3-ubyte: .*SHA-256 differs"):
        make_module(MNIST(), mnist_root)


def test_image_folder_is_described_by_its_files(image_folder):
    data = make_module(ImageFolder(size=16), image_folder, val_size=0)
    train, test = data.splits.train, data.splits.test
    assert data.spec.name == "colours" and data.spec.shape == (3, 16, 16) and data.spec.classes == CLASSES
    pixels = train.images.double() / 255
    assert data.spec.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist())
    assert data.spec.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist())
    assert len(train.labels) == 29 and len(test.labels) == 7
    assert not {x.numpy().tobytes() for x in train.images} & {x.numpy().tobytes() for x in test.images}
    assert torch.equal(data.spec.denormalize(data.spec.normalize(train.images)), train.images)


@pytest.mark.parametrize("parts", [("train", "test"), ("Training", "VALID"), ("train", "val", "Testing")])
def test_image_folder_keeps_its_splits_and_leaves_out_what_is_hidden(image_folder, parts):
    for name in CLASSES:
        for i, file in enumerate(sorted((image_folder / name).iterdir())):
            target = image_folder / parts[i % len(parts)] / name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            file.rename(target)
        (image_folder / name).rmdir()
    for hidden in ".ipynb_checkpoints/a.png", "__MACOSX/red/a.png", f"{parts[0]}/red/._x.png", f"{parts[0]}/red/a.heic":
        (image_folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (image_folder / hidden).write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"left out 1 files, as a\.heic"):
        splits = ImageFolder().load(image_folder)
    counts = [len(split.labels) for split in (splits.train, splits.val, splits.test) if split]
    assert splits.classes == CLASSES and sum(counts) == 36 and len(counts) == 3 - (parts == ("train", "test"))
    (image_folder / parts[0]).rename(image_folder / "test2")
    with pytest.raises(UserError, match=r"train/"):
        ImageFolder().load(image_folder)


def test_splits_and_folds_are_stratified_and_a_missing_class_is_a_warning(image_folder):
    data = make_module(ImageFolder(), image_folder, folds=4, fold=1)
    counts = [split.labels.bincount().tolist() for split in (data.splits.train, data.splits.val, data.splits.test)]
    assert sorted(counts[2]) == [2, 2, 3] and max(counts[1]) - min(counts[1]) <= 1
    folds = [make_module(ImageFolder(), image_folder, folds=4, fold=i).splits.val.images for i in range(4)]
    assert len({image.numpy().tobytes() for fold in folds for image in fold}) == 29
    with pytest.raises(UserError, match=r"data\.folds=4: must be 2 or more, and above data\.fold=4"):
        make_module(ImageFolder(), image_folder, folds=4, fold=4)
    with pytest.warns(UserWarning, match="the val split has no image of"):
        make_module(ImageFolder(), image_folder, val_size=2, val_split="stratified")


def test_transparent_and_16_bit_images_are_converted_as_in_predict(tmp_path):
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (2, 2, 6, 6))
    drawing.save(tmp_path / "a.png")
    assert resize_image(tmp_path / "a.png", (1, 8, 8))[0, ::7, ::7].tolist() == [[255, 255], [255, 255]]
    levels = []
    for level in 1000, 60_000:
        Image.fromarray(np.full((8, 8), level, np.uint16)).save(tmp_path / "a.tif")
        levels.append(int(resize_image(tmp_path / "a.tif", (1, 8, 8))[0, 0, 0]))
    assert levels == [3, 233]
    with pytest.raises(UserError, match="takes 4 channels"):
        resize_image(tmp_path / "a.png", (4, 8, 8))


def test_image_of_the_right_size_is_not_resampled(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    wide = np.concatenate([np.zeros((8, 8, 3), np.uint8), pixels, np.zeros((8, 8, 3), np.uint8)], axis=1)
    for array in pixels, wide:  # of the wide one, the middle
        Image.fromarray(array).save(tmp_path / "a.png")
        image = resize_image(tmp_path / "a.png", (3, 8, 8))
        assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(pixels))


@pytest.mark.parametrize("damage, workers", [(b"", "null"), (b"GIF89a", "2"), (None, "null")])
def test_run_on_a_damaged_image_folder_fails_in_one_line(run_main, image_folder, tmp_path, damage, workers):
    if damage is None:
        for name in CLASSES[1:]:
            (image_folder / name).rename(tmp_path / name)
    else:
        (image_folder / "red/0.png").write_bytes(damage)
    options = f"data.root={image_folder}", f"data.num_workers={workers}", f"hydra.run.dir={tmp_path / 'run'}"
    result = run_main(*TINY, "data=folder", *options)
    errors = [line for line in result.err.splitlines() if not line.startswith("warning: ")]
    assert result.code == 2 and len(errors) == 1, result.err
    assert ("two or more classes" if damage is None else "red/0.png: ") in result.err


def write_npz(file: Path, **changes) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)
    arrays = {"train_images": images[:15], "train_labels": np.arange(15)[:, None] % 3}
    arrays |= {"test_images": images[15:], "test_labels": np.arange(5) % 3} | changes
    np.savez(file, **{name: array for name, array in arrays.items() if array is not None})
    return file


def test_npz_file_is_described_by_its_arrays(tmp_path):
    file = write_npz(tmp_path / "fruit.npz", classes=np.array(["apple", "fig", "pear"]))
    data = make_module(NpzFile(), file, val_size=3)
    assert data.spec.shape == (3, 10, 12) and data.spec.classes == ("apple", "fig", "pear")
    assert data.spec.name == "fruit" and len(data.splits.train.labels) == 12
    few = {"train_images": np.zeros((4, 10, 12, 3), np.uint8), "train_labels": np.arange(4) % 3}
    data = make_module(NpzFile(), write_npz(tmp_path / "few.npz", **few))
    assert len(data.splits.val.labels) == 1 and data.train_batch_size == 8


def test_npz_file_may_have_its_own_validation_images_channels_first(tmp_path):
    arrays = {"images": np.zeros((9, 3, 10, 12), np.uint8), "labels": (np.arange(9) % 3)[:, None]}
    arrays = {f"{part}_{kind}": x for part in ("train", "val", "test") for kind, x in arrays.items()}
    data = make_module(NpzFile(), write_npz(tmp_path / "a.npz", **arrays))
    assert data.spec.shape == (3, 10, 12) and [len(split.labels) for split in data.splits[2:]] == [9, 9, 9]


@pytest.mark.parametrize(
    "change",
    [
        *({"train_images": x} for x in (np.zeros((15, 10, 12, 3)), np.zeros((15, 9, 9), np.uint8))),
        *({"train_labels": x} for x in (None, np.arange(15) - 1, np.arange(14), np.array([{}] * 15), np.ones(15))),
        *({"train_labels": x} for x in (np.eye(15, 3, dtype=int), 5 + np.arange(15) % 2, np.arange(15) % 3 * 10**9)),
        {"classes": np.array(["x"])},
        {f"{part}_images": np.zeros((n, 28, 28, 28), np.uint8) for part, n in (("train", 15), ("test", 5))},
    ],
)
def test_invalid_npz_file_raises(tmp_path, change):
    with pytest.raises(UserError, match=r"a\.npz: .*(needs train_images|must be uint8 images)"):
        NpzFile().load(write_npz(tmp_path / "a.npz", **change))


def test_torchvision_dataset_that_is_no_array_raises(tmp_path):
    with pytest.raises(UserError, match=r"Omniglot is not in .* could not be downloaded \(.*train"):
        TorchvisionDataset("Omniglot").download(tmp_path)
