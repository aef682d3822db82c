import gzip
import hashlib
import json
import subprocess
import sys
import threading
import warnings
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.datasets import MNIST

from src.core.errors import UserError
from src.data import sources
from src.data.augment import RandomAffine
from src.data.datamodule import ImageDataModule
from src.data.datasets import MNIST as MNISTSource
from src.data.datasets import Digits, MNISTOrDigits, download_mnist, has_mnist
from src.data.image_spec import MNIST_SPEC
from src.data.sampler import IndexBatchSampler, make_generator


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [4, 31, 32, 33, 97, 98, 99, 100])
def test_an_epoch_sees_every_sample_once(size, world_size):
    ranks = [list(IndexBatchSampler(size, 8, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(IndexBatchSampler(size, 8, world_size=world_size))}
    assert all(len(batch) for batches in ranks for batch in batches)
    assert sorted(torch.cat([torch.cat(batches) for batches in ranks]).tolist()) == list(range(size))


def test_too_few_samples_for_the_processes_are_refused():
    with pytest.raises(UserError, match="3 samples are too few for 4 processes"):
        IndexBatchSampler(3, 8, world_size=4)


def test_skipped_batches_are_left_out_once():
    batches = IndexBatchSampler(100, 8, seed=1)
    whole = [batch.tolist() for batch in batches]
    batches.skip(5)
    assert [batch.tolist() for batch in batches] == whole[5:]
    assert [batch.tolist() for batch in batches] == whole


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        batches = IndexBatchSampler(100, 8, seed=seed)
        batches.set_epoch(epoch)
        return torch.cat(list(batches)).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9


def test_generators_differ_by_the_order_of_their_keys():
    assert make_generator(1, 2).initial_seed() == make_generator(1, 2).initial_seed()
    assert make_generator(1, 2).initial_seed() != make_generator(2, 1).initial_seed()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_affine_without_amounts_changes_nothing(interpolation):
    images = torch.rand(3, 1, 28, 28)
    affine = RandomAffine(interpolation=interpolation)
    torch.testing.assert_close(affine(images, make_generator(0)), images, atol=1e-4, rtol=0)


def test_bicubic_interpolation_blurs_less():
    images = torch.rand(8, 1, 28, 28)

    def contrast(interpolation):
        return RandomAffine(translate=3, interpolation=interpolation)(images, make_generator(0))[..., 4:-4, 4:-4].std()

    assert contrast("bilinear") < 0.9 * contrast("bicubic") < contrast("bicubic") < images.std()


def test_affine_gives_each_image_its_own_amounts():
    images = torch.rand(1, 1, 28, 28).expand(4, 1, 28, 28)
    moved = RandomAffine(degrees=10, translate=2, scale=0.1, shear=0.1)(images, make_generator(0))
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 4
    assert torch.equal(moved, RandomAffine(10, 2, 0.1, 0.1)(images, make_generator(0)))


def test_translation_is_in_pixels():
    dot = torch.zeros(64, 1, 28, 28)
    dot[:, :, 14, 14] = 1
    moved = RandomAffine(translate=3)(dot, make_generator(0))
    ys, xs = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    distances = torch.stack([(moved[:, 0] * axis).sum((1, 2)) - 14 for axis in (ys, xs)]).abs()
    assert 2.5 < distances.max() <= 3.001


def test_elastic_displacement_is_smooth_and_in_pixels():
    ramp = torch.arange(28.0).expand(64, 1, 28, 28)  # what a pixel reads is where it was taken from
    found = RandomAffine(elastic=2)(ramp, make_generator(0))[..., 4:-4, 4:-4] - ramp[..., 4:-4, 4:-4]
    assert 1.5 < found.abs().max() < 2.9  # a smooth curve may leave the range of its knots
    assert found.diff(dim=-1).abs().max() < 1 and found.diff(dim=-2).abs().max() < 1
    assert found.std((1, 2, 3)).min() > 0.1


def test_rotation_keeps_the_middle_and_its_angle():
    bar = torch.zeros(256, 1, 28, 28)
    bar[:, :, 4:24, 13:15] = 1
    turned = RandomAffine(degrees=30)(bar, make_generator(0))
    ys, xs = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    weight = turned[:, 0]
    angles = 0.5 * torch.atan2(2 * (weight * xs * ys).sum((1, 2)), (weight * (ys**2 - xs**2)).sum((1, 2)))
    assert 28 < angles.abs().max().rad2deg() < 31
    torch.testing.assert_close((weight * xs).sum((1, 2)), torch.zeros(256), atol=1e-2, rtol=0)


@pytest.mark.parametrize("progress, strength", [(0, 1), (0.6, 1), (0.8, 0.5), (1, 0)])
def test_augmentation_decays_over_the_end_of_a_run(progress, strength):
    images = torch.rand(8, 1, 28, 28)
    limits = {"degrees": 10, "translate": 2, "scale": 0.1, "shear": 0.1, "elastic": 1}
    weaker = RandomAffine(**{name: limit * strength for name, limit in limits.items()})(images, make_generator(0))
    decayed = RandomAffine(**limits, decay=0.4)(images, make_generator(0), progress)
    torch.testing.assert_close(decayed, weaker, atol=1e-4, rtol=0)


def test_normalised_black_and_white():
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8)
    assert MNIST_SPEC.normalize(black_and_white).tolist() == pytest.approx([-0.4242, 2.8215], abs=1e-4)


def test_digits_have_the_form_of_mnist():
    name, _, train, test = Digits().read(Path())
    assert name == "digits"
    assert train.images.shape == (1437, 1, 28, 28) and test.images.shape == (360, 1, 28, 28)
    assert train.images.dtype == torch.uint8 and train.images.max() == 255
    assert train.images[:, :, :4].max() == 0 and set(train.labels.tolist()) == set(range(10))


def read_mnist(root):
    return MNISTSource().read(root)


def module(**settings) -> ImageDataModule:
    settings = {"source": MNISTSource(), "batch_size": 8, "val_size": 10} | settings
    settings["root"] = str(settings["root"])
    data = ImageDataModule(**settings)
    data.prepare_data()
    data.setup("fit")
    return data


def all_images(loader) -> set[bytes]:
    return {image.numpy().tobytes() for images, _ in loader for image in images}


def test_training_validation_and_test_images_are_apart(mnist_root):
    data = module(root=mnist_root)
    train, val, test = map(all_images, (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()))
    assert (len(train), len(val), len(test)) == (30, 10, 20)
    assert not (train & val or train & test or val & test)
    assert all_images(module(root=mnist_root, split_seed=1).val_dataloader()) != val
    last = module(root=mnist_root, split_seed=None)
    assert torch.equal(last.val.labels, read_mnist(mnist_root).train.labels[-10:].flip(0))
    assert len(all_images(last.train_dataloader()) - all_images(last.val_dataloader())) == 30


def test_without_a_split_all_images_are_for_training(mnist_root):
    data = module(root=mnist_root, val_size=0)
    assert len(all_images(data.train_dataloader())) == 40 and data.val_dataloader() == []
    on_test = module(root=mnist_root, val_size=0, test_every_epoch=True)
    assert all_images(on_test.val_dataloader()) == all_images(on_test.test_dataloader())


def test_fewer_images_are_a_part_of_more_and_none_of_those_held_out(mnist_root):
    fewer, more, whole = (module(root=mnist_root, train_size=size) for size in (7, 20, None))
    few, many, all_ = (all_images(data.train_dataloader()) for data in (fewer, more, whole))
    assert (len(few), len(many), len(all_)) == (7, 20, 30) and few < many < all_
    assert torch.equal(fewer.val.images, whole.val.images)
    with pytest.raises(UserError, match=r"data\.train_size=31: 30 images are not held out"):
        module(root=mnist_root, train_size=31)


def test_a_split_that_leaves_nothing_is_refused(mnist_root):
    with pytest.raises(UserError, match=r"data\.val_size=40: mnist has 40 training images"):
        module(root=mnist_root, val_size=40)


@pytest.fixture
def mirror(mnist_root, tmp_path, monkeypatch):
    """A local server with `mnist_root`'s files as torchvision's mirrors have them; yields the requests it got."""
    resources, served = [], []
    (tmp_path / "mirror").mkdir()
    for file in (mnist_root / "MNIST/raw").iterdir():
        packed = gzip.compress(file.read_bytes())
        (tmp_path / f"mirror/{file.name}.gz").write_bytes(packed)
        resources.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self):
            served.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "mirror")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(MNIST, "resources", resources)
    yield served
    server.shutdown()


def test_download_once_also_when_several_start_together(mirror, mnist_root, tmp_path):
    download_mnist(tmp_path / "alone")
    alone = len(mirror)
    root = tmp_path / "new"
    threads = [threading.Thread(target=download_mnist, args=(root,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(mirror) == 2 * alone
    assert torch.equal(read_mnist(root).train.images, read_mnist(mnist_root).train.images)
    assert [file.name for file in root.iterdir() if file.name != ".mnist.lock"] == ["MNIST"]


@pytest.mark.slow
def test_two_processes_on_an_empty_folder_download_once_and_train(mirror, tmp_path):
    download_mnist(tmp_path / "alone")
    alone = len(mirror)
    code = f"""
import sys
from torchvision.datasets import MNIST
from src import train
from src.data import sources
MNIST.mirrors, MNIST.resources = {MNIST.mirrors!r}, {MNIST.resources!r}
sources.MNIST_FILES = {sources.MNIST_FILES!r}
train.main()
"""
    tiny = "model.channels=[4,4,4,4,4,4]", "data.val_size=10", "trainer.max_epochs=1", "callbacks.tensorboard=null"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, *tiny, f"data.root={tmp_path / 'new'}", f"hydra.run.dir={tmp_path / name}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one", "two")
    ]
    for run in runs:
        printed, _ = run.communicate(timeout=120)
        assert run.returncode == 0, printed
    assert len(mirror) == 2 * alone
    one, two = (json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("one", "two"))
    assert one == two


def test_a_damaged_download_never_counts_as_data(mirror, mnist_root, tmp_path, monkeypatch):
    known = dict(sources.MNIST_FILES)
    known["t10k-labels-idx1-ubyte"] = (known["t10k-labels-idx1-ubyte"][0], "0" * 64)
    monkeypatch.setattr(sources, "MNIST_FILES", known)
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte"):
        download_mnist(tmp_path / "new")
    assert not has_mnist(tmp_path / "new") and not (tmp_path / "new/MNIST").exists()


@pytest.fixture
def no_network(monkeypatch):
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])  # the discard port: nothing listens


def test_without_a_network_the_error_names_the_way_out(no_network, tmp_path):
    with pytest.raises(UserError, match=r"could not be downloaded .* MNIST_ROOT .* data=digits"):
        download_mnist(tmp_path / "new")


def test_auto_falls_back_to_digits_and_says_so(no_network, tmp_path):
    with pytest.warns(UserWarning, match="small digits"):
        data = module(source=MNISTOrDigits(), root=tmp_path, batch_size=None, val_size=None)
    assert data.spec.name == "digits" and len(data.train_dataloader().dataset) == 1437 - 143
    with warnings.catch_warnings(action="error"):
        data.prepare_data()  # as Lightning does again before the test


def test_auto_takes_mnist_where_it_is(mnist_root):
    with warnings.catch_warnings(action="error"):
        assert module(source=MNISTOrDigits(), root=mnist_root).spec.name == "mnist"


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda content: content[:-1], "bytes where MNIST's has"),
        (lambda content: b"", "has 0 bytes"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "SHA-256 differs"),
    ],
)
@pytest.mark.parametrize("name", sources.MNIST_FILES)
def test_a_damaged_file_is_named(mnist_root, name, damage, words):
    file = mnist_root / "MNIST/raw" / name
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"{name} .*{words}.*; delete it"):
        module(root=mnist_root)


def test_swapped_files_are_refused(mnist_root):
    raw = mnist_root / "MNIST/raw"
    (raw / "train-images-idx3-ubyte").rename(raw / "other")
    (raw / "t10k-images-idx3-ubyte").rename(raw / "train-images-idx3-ubyte")
    (raw / "other").rename(raw / "t10k-images-idx3-ubyte")
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        module(root=mnist_root)


@pytest.mark.mnist
def test_the_real_mnist_reads(real_mnist):
    name, _, train, test = read_mnist(real_mnist)
    assert name == "mnist" and train.images.shape == (60_000, 1, 28, 28) and test.labels.shape == (10_000,)
    assert train.images.float().mean().item() / 255 == pytest.approx(0.1307, abs=5e-5)
