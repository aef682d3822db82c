"""Soft labels: computed once per image and epoch, cached, and read back."""

import pytest
import torch

from src.core.errors import UserError
from src.data.augment import RandomAffine
from src.distillation import soft_labels
from src.distillation.soft_labels import Ensemble, SoftLabels
from src.models.cnn import CNN
from tests.specs import MNIST_SPEC


class CountingTeacher(torch.nn.Module):
    """Return the three largest pixels, and count the images."""

    def __init__(self, files) -> None:
        super().__init__()
        self.digest, self.specs, self.layer = "-".join(files), {}, torch.nn.Linear(3, 3)

    def forward(self, images):
        CountingTeacher.count += len(images)
        CountingTeacher.dtype = self.layer(images.flatten(1)[:, :3]).dtype
        return images.flatten(1).topk(3).values


@pytest.fixture
def make_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(soft_labels, "Ensemble", CountingTeacher)
    CountingTeacher.count = 0
    augment = RandomAffine(degrees=10, translate=2, elastic=1, fade_out=0.5)
    images = torch.randint(256, (7, 1, 28, 28), dtype=torch.uint8)
    defaults = {"images": images, "augment": augment, "spec": MNIST_SPEC, "epoch": 3, "progress": 0.6}

    def make(teachers=("one",), seed=0, **changes):
        return SoftLabels(teachers, str(tmp_path / "cache"), seed).prepare_epoch(**defaults | changes)

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
    with pytest.raises(UserError, match=r"\.pt: damaged .*; delete it"):
        make_epoch()


def test_ensemble_averages_its_networks_and_is_identified_by_their_files(tmp_path):
    model, files, images = {"_target_": "src.models.cnn.CNN", "channels": [2] * 6}, [], torch.randn(4, 1, 28, 28)
    for name in "ab":
        state = CNN(channels=(2,) * 6).state_dict()
        files.append(str(tmp_path / f"{name}.pt"))
        torch.save({"state_dict": state, "model": model, "data": MNIST_SPEC.to_dict()}, files[-1])
    both, first, second = Ensemble(files), Ensemble(files[:1]), Ensemble(files[1:])
    torch.testing.assert_close(both(images), (first(images) + second(images)) / 2)
    assert len({both.digest, first.digest, second.digest}) == 3 and both.digest == Ensemble(files).digest


def test_teacher_of_other_images_is_named(tmp_path, small_weights):
    other = MNIST_SPEC._replace(shape=(3, 28, 28))
    with pytest.raises(UserError, match=r"small\.pt was trained on images of another shape"):
        SoftLabels([str(small_weights)], str(tmp_path)).prepare_epoch(torch.zeros(1), RandomAffine(), other, 0, 0)


@pytest.mark.parametrize("teachers, error", [("[]", "teachers is empty"), ("[nowhere]", "nowhere: cannot be loaded")])
def test_missing_teachers_are_one_line(run_main, tmp_path, teachers, error):
    setting = f"+data.soft_labels={{_target_:src.distillation.soft_labels.SoftLabels,teachers:{teachers},folder:x}}"
    result = run_main("data=digits", setting, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and error in result.err
