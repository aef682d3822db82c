"""Batches: their order, augmentation and normalisation, the splits, and how the data module makes them."""

import lightning as L
import pytest
import torch

from src.core.errors import UserError
from src.data.augment import RandomAffine
from src.data.datamodule import ImageDataModule
from src.data.datasets import MNIST, Digits, ImageFolder
from src.data.image_spec import ImageSpec
from src.data.sampler import IndexBatchSampler
from tests.specs import MNIST_SPEC


def make_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [4, 31, 32, 33, 97, 98, 99, 100])
def test_sampler_yields_every_index_once_per_epoch(size, world_size):
    ranks = [list(IndexBatchSampler(size, 8, seed=1, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(batches) for batches in ranks} == {len(IndexBatchSampler(size, 8, world_size=world_size))}
    assert all(len(batch) for batches in ranks for batch in batches)
    assert sorted(torch.cat([torch.cat(batches) for batches in ranks]).tolist()) == list(range(size))


def test_weighted_sampler_draws_each_class_equally_often():
    labels, sampler = (torch.arange(1000) < 100).long(), IndexBatchSampler(1000, 8, seed=1)
    sampler.weights = 1 / labels.bincount()[labels]
    order = torch.cat(list(sampler))
    assert len(order) == 1000 and 450 < labels[order].sum() < 550


def test_sampler_order_depends_on_seed_and_epoch_alone():
    def draw_order(seed, epoch):
        sampler = IndexBatchSampler(100, 8, seed=seed)
        sampler.set_epoch(epoch)
        return torch.cat(list(sampler)).tolist()

    assert draw_order(0, 0) == draw_order(0, 0)
    assert len({tuple(draw_order(seed, epoch)) for seed in (0, 1, 2) for epoch in (0, 1, 2)}) == 9


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_affine_with_zero_limits_returns_the_images(interpolation):
    images = torch.rand(3, 1, 28, 28)
    affine = RandomAffine(interpolation=interpolation)
    torch.testing.assert_close(affine(images, make_generator()), images, atol=1e-4, rtol=0)


def test_translation_is_in_pixels():
    dots = torch.zeros(64, 1, 28, 28)
    dots[:, :, 14, 14] = 1
    moved = RandomAffine(translate=3)(dots, make_generator())
    ys, xs = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")
    distances = torch.stack([(moved[:, 0] * axis).sum((1, 2)) - 14 for axis in (ys, xs)]).abs()
    assert 2.5 < distances.max() <= 3.001


def test_elastic_displacement_is_smooth_and_in_pixels():
    ramp = torch.arange(28.0).expand(64, 1, 28, 28)  # the value of a pixel is the column that it was taken from
    displacements = RandomAffine(elastic=2)(ramp, make_generator())[..., 4:-4, 4:-4] - ramp[..., 4:-4, 4:-4]
    assert 1.5 < displacements.abs().max() < 2.9  # a smooth curve may leave the range of its knots
    assert displacements.diff(dim=-1).abs().max() < 1 and displacements.diff(dim=-2).abs().max() < 1
    assert displacements.std((1, 2, 3)).min() > 0.1


def test_rotation_is_in_degrees_and_keeps_the_centre():
    bars = torch.zeros(256, 1, 28, 28)
    bars[:, :, 4:24, 13:15] = 1
    rotated = RandomAffine(degrees=30)(bars, make_generator())[:, 0]
    ys, xs = torch.meshgrid(torch.arange(28) - 13.5, torch.arange(28) - 13.5, indexing="ij")
    angles = 0.5 * torch.atan2(2 * (rotated * xs * ys).sum((1, 2)), (rotated * (ys**2 - xs**2)).sum((1, 2)))
    assert 28 < angles.abs().max().rad2deg() < 31
    torch.testing.assert_close((rotated * xs).sum((1, 2)), torch.zeros(256), atol=1e-2, rtol=0)


@pytest.mark.parametrize("progress, strength", [(0, 1), (0.6, 1), (0.8, 0.5), (1, 0)])
def test_augmentation_fades_out_at_the_end_of_a_run(progress, strength):
    images = torch.rand(8, 1, 28, 28)
    limits = {"degrees": 10, "translate": 2, "scale": 0.1, "shear": 0.1, "elastic": 1}
    weaker = RandomAffine(**{name: limit * strength for name, limit in limits.items()})(images, make_generator())
    faded = RandomAffine(**limits, fade_out=0.4)(images, make_generator(), progress)
    torch.testing.assert_close(faded, weaker, atol=1e-4, rtol=0)


def test_spec_normalizes_and_denormalizes():
    black_and_white = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert MNIST_SPEC.normalize(black_and_white)[0, 0].tolist() == pytest.approx([-0.4242, 2.8215], abs=1e-4)
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(MNIST_SPEC.denormalize(MNIST_SPEC.normalize(levels)), levels)
    assert ImageSpec.from_dict(MNIST_SPEC._asdict()) == MNIST_SPEC and MNIST_SPEC.label_name == "digit"


def make_module(**settings) -> ImageDataModule:
    data = ImageDataModule(**{"dataset": MNIST(), "batch_size": 8, "val_size": 10} | settings)
    data.prepare_data()
    data.setup("fit")
    return data


def to_set(images) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_training_validation_and_test_images_are_disjoint(mnist_root):
    data = make_module(root=str(mnist_root))
    train, val, test = (to_set(split.images) for split in (data.splits.train, data.splits.val, data.splits.test))
    assert (len(train), len(val), len(test)) == (30, 10, 20)
    assert not (train & val or train & test or val & test)
    assert to_set(make_module(root=str(mnist_root), split_seed=1).splits.val.images) != val
    last = make_module(root=str(mnist_root), val_split="last").splits
    assert torch.equal(last.val.labels, MNIST().load(mnist_root).train.labels[-10:].flip(0))
    assert len(to_set(last.train.images) - to_set(last.val.images)) == 30


def test_val_size_zero_trains_on_all_images(mnist_root):
    data = make_module(root=str(mnist_root), val_size=0)
    assert len(to_set(data.splits.train.images)) == 40 and data.val_dataloader() == []
    on_test = make_module(root=str(mnist_root), val_size=0, test_every_epoch=True)
    assert torch.equal(on_test.splits.val.images, on_test.splits.test.images)


def test_smaller_train_size_is_a_subset_of_a_larger_one(mnist_root):
    modules = [make_module(root=str(mnist_root), train_size=size) for size in (7, 20, None)]
    few, more, whole = (to_set(data.splits.train.images) for data in modules)
    assert (len(few), len(more), len(whole)) == (7, 20, 30) and few < more < whole
    assert torch.equal(modules[0].splits.val.images, modules[2].splits.val.images)
    with pytest.raises(UserError, match="30 of 40 training images are not held out"):
        make_module(root=str(mnist_root), train_size=31)
    with pytest.raises(UserError, match="0 of 40 training images"):
        make_module(root=str(mnist_root), val_size=40)


class BatchRecorder(L.LightningModule):
    """Keep the batches of each stage; the loss depends on no image. It unpacks batches as any module does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.batches = torch.nn.Parameter(torch.zeros(1)), {"train": [], "val": [], "test": []}

    def training_step(self, batch, batch_idx):
        images, labels = batch
        self.batches["train"].append((images, labels))
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        self.batches["val"].append(tuple(batch))
        self.log("val/acc", self.weight.sum())  # Lightning must find the batch size without a warning

    def test_step(self, batch, batch_idx):
        self.batches["test"].append(tuple(batch))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record_batches(tmp_path, data) -> BatchRecorder:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = L.Trainer(max_epochs=1, default_root_dir=tmp_path, enable_model_summary=False, **options)
    trainer.fit(module := BatchRecorder(), data)
    trainer.test(module, data, verbose=False)
    return module


def test_each_stage_gets_its_own_normalized_images(tmp_path, recwarn):
    data = ImageDataModule(Digits(), batch_size=32, augment=RandomAffine(degrees=20), preprocess="mnist")
    batches = record_batches(tmp_path, data).batches
    images, labels = {}, {}
    for stage, pairs in batches.items():
        images[stage], labels[stage] = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert torch.equal(images["test"], data.spec.normalize(data.splits.test.images))
    assert torch.equal(labels["val"][-143:], data.splits.val.labels)
    order = torch.cat(list(data.train_dataloader()))
    assert torch.equal(labels["train"], data.splits.train.labels[order])
    plain = data.spec.normalize(data.splits.train.images[order])
    assert images["train"].shape == plain.shape and not torch.equal(images["train"], plain)
    assert not [warning for warning in recwarn if "batch_size" in str(warning.message)]
    raw = [torch.cat(parts) for parts in zip(*data.raw_batches("test"), strict=True)]
    assert torch.equal(raw[0], data.splits.test.images) and torch.equal(raw[1], data.splits.test.labels)


def test_worker_processes_make_the_same_batches_as_memory(tmp_path, image_folder):
    in_memory, by_workers = (
        ImageDataModule(
            ImageFolder(size=16), str(image_folder), batch_size=8, augment=RandomAffine(translate=2), num_workers=count
        )
        for count in (None, 2)
    )
    expected, batches = record_batches(tmp_path, in_memory).batches, record_batches(tmp_path, by_workers).batches
    assert in_memory.spec == by_workers.spec and by_workers.splits.train[torch.tensor([1])][0].shape == (1, 3, 16, 16)
    for stage in expected:
        for one, other in zip(expected[stage], batches[stage], strict=True):
            assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for one, other in zip(in_memory.raw_batches("train"), by_workers.raw_batches("train"), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_resuming_with_other_images_raises():
    data = make_module(dataset=Digits(), val_size=None)
    data.load_state_dict(data.state_dict())
    with pytest.raises(UserError, match="other images"):
        data.load_state_dict(data.state_dict() | {"mean": [0.5]})
