import pytest
import torch

from src.core.errors import UserError
from src.data.augment import RandomAffine
from src.data.image_spec import MNIST_SPEC
from src.distillation.ensemble import Ensemble
from src.distillation.soft_labels import SoftLabels
from src.models.cnn import CNN


class Loudest(torch.nn.Module):
    """A teacher that counts what it is asked, and answers with the three largest pixels."""

    digest, asked = "loudest", 0

    def forward(self, images):
        self.asked += len(images)
        return images.flatten(1).topk(3).values


def test_a_teacher_is_asked_once_about_each_image_of_an_epoch(tmp_path):
    images = torch.randint(256, (7, 1, 28, 28), dtype=torch.uint8)
    augment, teacher = RandomAffine(degrees=10, translate=2, elastic=1, decay=0.5), Loudest()
    view = SoftLabels(teacher, tmp_path / "answers").view(images, augment, MNIST_SPEC, epoch=3, progress=0.6)
    index = torch.tensor([4, 1, 6])
    seen, answers = view.batch(images[index], index)
    torch.testing.assert_close(answers, teacher(MNIST_SPEC.normalize(seen)))
    assert teacher.asked == 7 + 3 and not torch.equal(seen, images[index].float())

    again = SoftLabels(teacher, tmp_path / "answers").view(images, augment, MNIST_SPEC, epoch=3, progress=0.6)
    assert teacher.asked == 10 and torch.equal(again.answers, view.answers)
    assert torch.equal(again.batch(images[index], index)[0], seen)


def test_another_question_is_asked_anew(tmp_path):
    images, teacher = torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8), Loudest()
    asked = {"images": images, "augment": RandomAffine(degrees=10, decay=0.5), "spec": MNIST_SPEC}
    asked |= {"epoch": 0, "progress": 0.7}
    views = [SoftLabels(teacher, tmp_path).view(**asked)]
    for change in (
        {"images": images.flip(0)},
        {"augment": RandomAffine(degrees=11, decay=0.5)},
        {"epoch": 1},
        {"progress": 0.8},
    ):
        views.append(SoftLabels(teacher, tmp_path).view(**asked | change))
    views.append(SoftLabels(teacher, tmp_path, seed=1).view(**asked))
    teacher.digest = "louder"
    views.append(SoftLabels(teacher, tmp_path).view(**asked))
    assert teacher.asked == 4 * len(views) == 28
    assert len({tuple(view.answers.flatten().tolist()) for view in views}) == 6  # the last is the first


@pytest.mark.parametrize("tiles", [True, False])
def test_a_processor_with_tiles_is_asked_in_bfloat16_and_says_so(tmp_path, monkeypatch, tiles):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles}, raising=False)
    asked = []

    class Teacher(torch.nn.Linear):
        digest = "linear"

        def forward(self, images):
            answers = super().forward(images.flatten(1))
            asked.append(answers.dtype)
            return answers

    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    view = SoftLabels(Teacher(784, 10), tmp_path).view(images, RandomAffine(), MNIST_SPEC, 0, 0.0)
    assert asked == [torch.bfloat16 if tiles else torch.float32] and view.answers.dtype == torch.float32
    (file,) = tmp_path.glob("*.pt")
    assert file.stem.endswith("-bfloat16") == tiles


def test_damaged_answers_are_one_line(tmp_path):
    arguments = torch.zeros(2, 1, 28, 28, dtype=torch.uint8), RandomAffine(), MNIST_SPEC, 0, 0.0
    SoftLabels(Loudest(), tmp_path).view(*arguments)
    file = next(tmp_path.glob("*.pt"))
    whole, answers = file.read_bytes(), torch.load(file, weights_only=True)
    SoftLabels(Loudest(), tmp_path, seed=1).view(*arguments)
    (other,) = set(tmp_path.glob("*.pt")) - {file}
    for wrong in whole[:100], whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:], other.read_bytes():
        file.write_bytes(wrong)
        with pytest.raises(UserError, match="damaged; delete it"):
            SoftLabels(Loudest(), tmp_path).view(*arguments)
    torch.save(answers.flip(0), file)
    with pytest.raises(UserError, match="damaged; delete it"):
        SoftLabels(Loudest(), tmp_path).view(*arguments)


def test_an_ensemble_is_the_mean_of_its_networks_and_known_by_their_files(tmp_path):
    files, images = [], torch.randn(4, 1, 28, 28)
    model = {"_target_": "src.models.cnn.CNN", "channels": [2] * 6, "dropout": 0.5}
    for name in "ab":
        content = {"state_dict": CNN(channels=(2,) * 6).state_dict(), "model": model, "data": MNIST_SPEC.plain()}
        torch.save(content, tmp_path / f"{name}.pt")
        files.append(str(tmp_path / f"{name}.pt"))
    both = Ensemble(files)
    torch.testing.assert_close(both(images), (Ensemble(files[:1])(images) + Ensemble(files[1:])(images)) / 2)
    assert not any(net.training for net in both.parts) and not any(
        parameter.requires_grad for parameter in both.parameters()
    )
    assert both.digest == Ensemble(files).digest
    assert len({both.digest, Ensemble(files[:1]).digest, Ensemble(files[1:]).digest}) == 3


@pytest.mark.parametrize("files, words", [("[]", "files is empty"), ("[nowhere]", "nowhere: no such file; name a run")])
def test_teachers_that_are_not_there_are_one_line(run_main, tmp_path, files, words):
    ensemble = f"+data.soft_labels={{_target_:src.distillation.ensemble.Ensemble,files:{files}}}"
    result = run_main("data=digits", ensemble, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and words in result.err
