"""Soft labels: computed once per image and epoch, cached, and read back."""

import pytest
import torch

from src.core.errors import UserError
from src.data.augment import RandomAffine
from src.distillation import soft_labels
from src.distillation.soft_labels import SoftLabels
from tests.specs import MNIST_SPEC


class CountingTeacher(torch.nn.Module):
    """Return the three largest pixels, and count the images."""

    spec = MNIST_SPEC

    def __init__(self, file) -> None:
        super().__init__()
        self.file, self.layer = file, torch.nn.Linear(3, 3)

    def log_probabilities(self, images):
        CountingTeacher.count += len(images)
        CountingTeacher.dtype = self.layer(images.flatten(1)[:, :3]).dtype
        return images.flatten(1).topk(3).values


@pytest.fixture
def make_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(soft_labels, "load_predictor", CountingTeacher)
    for name in "one", "two":
        (tmp_path / name).write_text(name)
    CountingTeacher.count = 0
    augment = RandomAffine(degrees=10, translate=2, elastic=1, fade_out=0.5)
    images = torch.randint(256, (7, 1, 28, 28), dtype=torch.uint8)
    defaults = {"images": images, "augment": augment, "spec": MNIST_SPEC, "epoch": 3, "progress": 0.6}

    def make(teachers=("one",), seed=0, **changes):
        return SoftLabels([tmp_path / name for name in teachers], str(tmp_path / "cache"), seed).prepare_epoch(
            **defaults | changes
        )

    make.images, make.folder = images, tmp_path / "cache"
    return make


def test_teacher_outputs_are_computed_once_per_epoch(make_epoch):
    indices = torch.tensor([4, 1, 6])
    images, log_probs = make_epoch()(make_epoch.images[indices], indices)
    assert CountingTeacher.count == 7 and not torch.equal(images, make_epoch.images[indices].float())
    torch.testing.assert_close(log_probs, MNIST_SPEC.normalize(images).flatten(1).topk(3).values)
    cached = make_epoch()(make_epoch.images[indices], indices)
    assert CountingTeacher.count == 7 and torch.equal(cached[0], images) and torch.equal(cached[1], log_probs)


def test_changed_settings_are_computed_anew(make_epoch):
    changes = [{}, {"images": make_epoch.images.flip(0)}, {"augment": RandomAffine(degrees=11)}, {"epoch": 1}]
    for change in [*changes, {"progress": 0.8}, {"seed": 1}, {"teachers": ("two",)}]:
        make_epoch(**change)
    assert CountingTeacher.count == 7 * 7 and len(list(make_epoch.folder.glob("*.pt"))) == 7


@pytest.mark.parametrize("has_amx", [True, False])
def test_processor_with_amx_computes_in_bfloat16(make_epoch, monkeypatch, has_amx):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": has_amx}, raising=False)
    assert make_epoch()(make_epoch.images, torch.arange(7))[1].dtype == torch.float32
    assert CountingTeacher.dtype == (torch.bfloat16 if has_amx else torch.float32)


def test_damaged_cache_file_raises(make_epoch):
    make_epoch()
    (file,) = make_epoch.folder.glob("*.pt")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=r"\.pt: damaged.*; delete it"):
        make_epoch()


def test_soft_labels_are_the_mean_of_several_teachers(make_epoch):
    make_epoch(["one", "two"])
    assert CountingTeacher.count == 14


def test_teacher_of_other_images_is_named(tmp_path, small_weights):
    other = MNIST_SPEC._replace(shape=(3, 28, 28))
    with pytest.raises(UserError, match=r"small\.pt was trained on images of another shape"):
        SoftLabels([str(small_weights)], str(tmp_path)).prepare_epoch(torch.zeros(1), RandomAffine(), other, 0, 0)


def test_missing_teacher_is_one_line(run_main, tmp_path):
    setting = "+data.soft_labels={_target_:src.distillation.soft_labels.SoftLabels,teachers:[nowhere],folder:x}"
    result = run_main("data=digits", setting, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "nowhere: cannot be loaded" in result.err
