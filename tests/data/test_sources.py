"""Data sets of one's own: read, described, trained on, and read again from pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from src import evaluate, export, predict
from src.core.errors import UserError
from src.data.datamodule import ImageDataModule
from src.data.datasets import ImageFolder, NpzFile, TorchvisionDataset, load_into_memory
from src.data.preprocess import resize_image

COLOURS = "blue", "green", "red"
TINY = "model.channels=[4,4,4,4,4,4]", "trainer.max_epochs=2", "data.batch_size=8", "callbacks.model_summary=null"


def picture(colour: str, height: int, width: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 100, (height, width, 3))
    pixels[..., ("red", "green", "blue").index(colour)] += 120
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Three classes of 12 pictures, of several sizes and formats."""
    for colour in COLOURS:
        (tmp_path / "colours" / colour).mkdir(parents=True)
        for i in range(12):
            suffix = ("png", "jpg", "bmp", "webp")[i % 4]
            picture(colour, 20 + 3 * i, 30 + i, i).save(tmp_path / f"colours/{colour}/{i}.{suffix}")
    return tmp_path / "colours"


@pytest.fixture
def fashion(tmp_path) -> Path:
    """Fashion-MNIST's layout with two kinds of noise in 120 training and 60 test images."""
    raw = tmp_path / "root/FashionMNIST/raw"
    raw.mkdir(parents=True)
    for split, count in ("train", 120), ("t10k", 60):
        labels = np.arange(count, dtype=np.uint8) % 2
        images = np.random.default_rng(count).integers(0, 100, (count, 28, 28)) + 150 * labels[:, None, None]
        header = [n.to_bytes(4, "big") for n in (2051, count, 28, 28)]
        (raw / f"{split}-images-idx3-ubyte").write_bytes(b"".join(header) + images.astype(np.uint8).tobytes())
        header = [n.to_bytes(4, "big") for n in (2049, count)]
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(b"".join(header) + labels.tobytes())
    return tmp_path / "root"


def ready(source, root, **settings) -> ImageDataModule:
    data = ImageDataModule(source, str(root), **settings)
    data.prepare_data()
    data.setup("fit")
    return data


def test_a_folder_of_pictures_tells_its_shape_classes_and_scale(pictures):
    data = ready(ImageFolder(size=16), pictures, val_size=0)
    assert data.spec.name == "colours" and data.spec.shape == (3, 16, 16) and data.spec.classes == COLOURS
    images = data.sets.train.images.double() / 255
    assert data.spec.mean == pytest.approx(images.mean((0, 2, 3)).tolist())
    assert data.spec.std == pytest.approx(images.std((0, 2, 3), correction=0).tolist())
    assert len(data.sets.train.labels) == 29 and len(data.sets.test.labels) == 7
    both = [{image.numpy().tobytes() for image in part.images} for part in (data.sets.train, data.sets.test)]
    assert not both[0] & both[1]
    normalized = data.spec.normalize(data.sets.train.images)
    torch.testing.assert_close(normalized.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    assert torch.equal(data.spec.pixels(normalized), data.sets.train.images)


def test_a_folder_with_a_test_part_keeps_it(pictures):
    for part in "train", "test":
        (pictures / part).mkdir()
    for colour in COLOURS:
        (pictures / "test" / colour).mkdir()
        (pictures / colour).rename(pictures / "train" / colour)
        for file in sorted((pictures / "train" / colour).iterdir())[:4]:
            file.rename(pictures / "test" / colour / file.name)
    sets = ImageFolder().read(pictures)
    assert (len(sets.train), len(sets.test)) == (24, 12) and sets.classes == COLOURS


def test_grey_pictures_have_one_channel(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(np.full((9, 9), 50 * i, np.uint8)).save(tmp_path / name / f"{i}.png")
    assert load_into_memory(ImageFolder(size=8).read(tmp_path).train).images.shape == (8, 1, 8, 8)


def test_a_picture_of_the_right_size_stays_as_it_is():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert torch.equal(resize_image(Image.fromarray(pixels), (3, 8, 8)).permute(1, 2, 0), torch.from_numpy(pixels))
    wide = np.concatenate([np.zeros((8, 8, 3), np.uint8), pixels, np.zeros((8, 8, 3), np.uint8)], axis=1)
    assert torch.equal(resize_image(Image.fromarray(wide), (3, 8, 8)).permute(1, 2, 0), torch.from_numpy(pixels))


def test_workers_read_the_batches_that_memory_has(pictures):
    memory, workers = (ready(ImageFolder(size=16), pictures, batch_size=8, workers=n) for n in (None, 2))
    assert memory.spec == workers.spec
    for (images, labels), (same, of_same) in zip(memory.train_dataloader(), workers.train_dataloader(), strict=True):
        assert torch.equal(images, same) and torch.equal(labels, of_same)


def arrays(file: Path, **changed) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)
    content = {"train_images": images[:15], "train_labels": np.arange(15)[:, None] % 3}
    content |= {"test_images": images[15:], "test_labels": np.arange(5) % 3} | changed
    np.savez(file, **{name: array for name, array in content.items() if array is not None})
    return file


def test_an_npz_file_is_a_data_set(tmp_path):
    data = ready(NpzFile(), arrays(tmp_path / "fruit.npz", classes=np.array(["apple", "fig", "pear"])), val_size=3)
    assert data.spec.shape == (3, 10, 12) and data.spec.classes == ("apple", "fig", "pear")
    assert data.spec.name == "fruit" and len(data.train_dataloader().dataset) == 12
    data.load_state_dict(data.state_dict())
    with pytest.raises(UserError, match="other images"):
        data.load_state_dict(data.state_dict() | {"mean": [0.5, 0.5, 0.5]})


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"test_labels": None}, "needed are train_images"),
        ({"train_images": np.zeros((15, 10, 12, 3))}, "must be uint8"),
        ({"train_labels": np.arange(15) - 1}, "whole numbers from 0"),
        ({"train_labels": np.arange(14)}, "must be uint8"),
        ({"test_images": np.zeros((5, 9, 9), np.uint8)}, "do not fit together"),
        ({"classes": np.array(["apple"])}, "do not fit together"),
        ({"train_labels": np.array([{}] * 15)}, "not an .npz file of plain arrays"),
    ],
)
def test_what_is_no_npz_data_set_is_named(tmp_path, changed, words):
    with pytest.raises(UserError, match=words):
        NpzFile().read(arrays(tmp_path / "a.npz", **changed))


@pytest.mark.parametrize(
    "dataset, words", [("Nothing", "no such class"), ("os", "no such class"), ("Omniglot", "no test part")]
)
def test_what_torchvision_does_not_have_is_named(dataset, words):
    with pytest.raises(UserError, match=words):
        TorchvisionDataset(dataset)


def test_a_set_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match=r"FashionMNIST is not in .* could not be downloaded .* set data\.root"):
        TorchvisionDataset("FashionMNIST").prepare(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"GIF89a", None])
def test_a_broken_picture_is_named(run_main, pictures, damage, tmp_path):
    file = pictures / "red/0.png"
    if damage is None:
        for colour in COLOURS[1:]:
            (pictures / colour).rename(tmp_path / colour)
    else:
        file.write_bytes(damage)
    result = run_main(*TINY, "data=folder", f"data.root={pictures}", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and not (tmp_path / "run").exists()
    assert ("red/0.png: " in result.err) if damage is not None else ("two classes" in result.err)


def test_another_data_set_is_trained_on_scored_read_and_exported(run_main, fashion, tmp_path):
    folder = tmp_path / "run"
    result = run_main(*TINY, "data=fashion", f"data.root={fashion}", f"hydra.run.dir={folder}", "optimizer.lr=0.05")
    assert result.code == 0, result.err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["data"] == "fashionmnist"
    result = run_main(folder, "--output", tmp_path / "out", main=evaluate.main)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["accuracy"] == pytest.approx(metrics["metrics"]["test/acc"]) and "Ankle boot" in result.out

    images, labels = load_into_memory(TorchvisionDataset("FashionMNIST").read(fashion).test)
    names = ["T-shirt", "Trouser"]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:03}_{names[labels[i]]}.png")
    result = run_main(tmp_path, "--weights", folder, "--json", main=predict.main)
    answers = [one for one in json.loads(result.out) if Path(one["file"]).parent == tmp_path]
    right = [Path(one["file"]).stem[4:] == one["class"].partition("/")[0] for one in answers]
    assert sum(right) / len(right) == pytest.approx(scores["accuracy"])

    pytest.importorskip("onnxruntime")
    result = run_main(folder, "--output", tmp_path / "out", main=export.main)
    assert result.code == 0 and (tmp_path / "out/fashionmnist.onnx").exists(), result.err
