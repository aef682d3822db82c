import json
import re
import shutil
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from conftest import SMALL
from PIL import Image
from torch import nn

import src
from src import evaluate, export, predict
from src.core import allowed_targets
from src.core.errors import UserError
from src.data.datamodule import ImageDataModule
from src.data.datasets import Digits, TorchvisionDataset
from src.models.classifier import Classifier
from src.models.cnn import CNN
from src.training.predictor import SHIPPED_WEIGHTS, _read_config, load_predictor
from tests.specs import MNIST_SPEC

CHANNELS = [4, 4, 4, 4, 4, 4]


def make_model(**arguments):
    return {"_target_": ".models.cnn.CNN", "channels": CHANNELS, "dropout": 0.0} | arguments


def test_run_folder_checkpoint_and_pt_file_give_the_same_network(finished_run, tmp_path):
    from_folder, from_checkpoint = load_predictor(finished_run), load_predictor(finished_run / "checkpoints/last.ckpt")
    state = from_folder.net.state_dict()
    torch.save({"state_dict": state, "model": make_model(), "data": MNIST_SPEC._asdict()}, tmp_path / "net.pt")
    images = torch.randint(256, (3, 1, 28, 28), dtype=torch.uint8)
    assert from_folder.spec == from_checkpoint.spec and from_folder.spec.name == "digits"
    assert not from_folder.net.training and torch.equal(from_checkpoint(images), from_folder(images))
    normalized = torch.randn(3, 1, 28, 28)
    assert torch.equal(load_predictor(tmp_path / "net.pt").net(normalized), from_folder.net(normalized))


def test_a_library_network_downloads_no_weights_that_are_replaced(tmp_path, monkeypatch):
    (tmp_path / "zoo.py").write_text("def build(pretrained: bool = False): ...")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(allowed_targets, "ALLOWED_TARGETS", re.compile("zoo.build"))
    assert _read_config({"model": {"_target_": "zoo.build", "pretrained": True}}).model.pretrained is False


def test_evaluation_repeats_the_test_scores_of_the_run(finished_run, run_main, tmp_path):
    result = run_main(finished_run, "--output", tmp_path / "new", main=evaluate.main)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "new/scores.json").read_text())
    metrics = json.loads((finished_run / "metrics.json").read_text())["metrics"]
    assert scores["data"] == "digits" and scores["images"] == 360
    assert scores["accuracy"] == pytest.approx(metrics["test/acc"])
    assert scores["loss"] == pytest.approx(metrics["test/loss"], rel=1e-4)
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"scores.json", "confusion.png", "mistakes.png"}
    assert f"accuracy  {scores['accuracy']:.5g}" in result.out and f"folder  {tmp_path / 'new'}" in result.out
    result = run_main(finished_run, "--data", "mnits", main=evaluate.main)
    assert result.code == 2 and "Available options in 'data'" in result.err and len(result.err.splitlines()) == 1


@pytest.mark.mnist
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(file.stem for file in SHIPPED_WEIGHTS.parent.glob("*.json")))
def test_shipped_weights_score_what_their_run_did(run_main, real_mnist, tmp_path, name):
    file = SHIPPED_WEIGHTS.with_name(f"{name}.pt")
    result = run_main(file, "--root", real_mnist, "--output", tmp_path, main=evaluate.main)
    assert result.code == 0, result.err
    recorded = json.loads(file.with_suffix(".json").read_text())["metrics"]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 10_000
    assert scores["accuracy"] >= recorded["test/acc"] - 1e-4  # one image may be predicted otherwise on another machine
    assert scores["loss"] == pytest.approx(recorded["test/loss"], rel=1e-3)


class FixedOutputs(nn.Module):
    """Return four rows of probabilities, whatever the images."""

    spec, metrics = SimpleNamespace(classes=("cat", "dog", "emu"), name="pets"), {}

    def forward(self, images):
        return torch.tensor([[0.9, 0.1, 0.0], [0.6, 0.4, 0.0], [0.2, 0.8, 0.0], [0.3, 0.7, 0.0]]).log()


def test_scores_equal_those_computed_by_hand(tmp_path, capsys):
    batch = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1, 0])
    data = SimpleNamespace(raw_batches=lambda split: [batch], spec=FixedOutputs.spec)
    scores = evaluate.score_images(FixedOutputs(), data, tmp_path)
    assert scores["accuracy"] == 0.5 and scores["mistakes"] == 2 and scores["data"] == "pets"
    assert scores["report"]["cat"] == {"precision": 0.5, "recall": 0.5, "f1-score": 0.5, "support": 2}
    assert scores["report"]["emu"]["support"] == 0
    assert scores["loss"] == pytest.approx(-(torch.tensor([0.9, 0.4, 0.8, 0.3]).log().mean().item()))
    # Each image is in a bin of its own: the mean of |1 - 0.9|, |0 - 0.6|, |1 - 0.8|, |0 - 0.7|.
    assert scores["calibration_error"] == pytest.approx(0.4)
    assert "cat     0.5000    0.5000    0.5000         2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, words",
    [
        ([1], "cannot be loaded"),
        ({"state_dict": {}, "model": make_model()}, r"Missing key\(s\)"),
        ({"state_dict": CNN(CHANNELS).state_dict(), "model": make_model(channels=[4, 4, 4, 4, 4, 5])}, "size mismatch"),
        ({"state_dict": {}, "model": make_model(nonsense=1)}, "nonsense"),
        ({"state_dict": {}, "model": make_model(_target_="src.models.cnn.torch.hub.load")}, "_target_="),
        ({"state_dict": {}, "model": make_model(_target_="src.models.none.CNN")}, "_target_="),
        ({"state_dict": {}, "model": make_model(_target_="torch.optim.SGD")}, "cannot be loaded"),
        ({"state_dict": {}, "model": None}, "cannot be loaded"),
        ({"state_dict": {}}, "trained without a config"),
    ],
)
def test_file_without_a_trained_network_is_refused_in_one_line(content, words, tmp_path):
    if isinstance(content, dict) and "model" in content:
        content["data"] = MNIST_SPEC._asdict()
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words) as refusal:
        load_predictor(tmp_path / "x.pt")
    assert "\n" not in str(refusal.value) and str(refusal.value).startswith(f"{tmp_path / 'x.pt'}: ")


class Unusual(CNN):
    """Loads weights in its constructor and calls item() in forward."""

    def __init__(self, file):
        super().__init__(CHANNELS)
        self.load_state_dict(torch.load(file, weights_only=True)["state_dict"])

    def forward(self, images):
        return super().forward(images * max(1.0, images.mean().item()))


def test_checkpoint_saved_anywhere_is_loaded(finished_run, small_weights, tmp_path):
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    data, net = ImageDataModule(Digits()), Unusual(small_weights)
    trainer = L.Trainer(max_steps=1, limit_val_batches=0, enable_checkpointing=False, **options)
    trainer.fit(Classifier(net, partial(torch.optim.SGD, lr=0.1)), data)
    trainer.save_checkpoint(file := tmp_path / "x.ckpt")
    images = data.splits.test.images[:5]
    expected = net.eval()(data.spec.normalize(images)).log_softmax(1)
    assert torch.equal(src.load(file, net=Unusual(small_weights))(images), expected)
    with pytest.raises(UserError, match=r"trained without a config; load it by src.load\(FILE, net=NETWORK\)"):
        src.load(file)
    shutil.copy(finished_run / "checkpoints/last.ckpt", file)  # without the config of its folder
    assert torch.equal(src.load(file)(images), load_predictor(finished_run)(images))


def test_moved_run_folder_is_loaded(finished_run, tmp_path):
    shutil.copytree(finished_run, tmp_path / "moved")
    assert load_predictor(tmp_path / "moved").file == tmp_path / "moved/checkpoints/last.ckpt"


def test_results_have_a_folder_per_network_and_data(run_main, small_weights, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = shutil.copytree(finished_run, "run")
    assert run_main(run, "--best", main=evaluate.main).code == 0
    assert run_main(small_weights, "--data", "digits", main=evaluate.main).code == 0
    folders = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("scores.json")}
    assert folders == {"run/evaluation/best", "outputs/evaluation/small_digits"}


def test_torchvision_dataset_is_trained_evaluated_predicted_and_exported(run_main, mnist_root, tmp_path):
    folder = tmp_path / "run"
    (mnist_root / "MNIST").rename(mnist_root / "FashionMNIST")
    result = run_main(*SMALL, "data.batch_size=8", "data=fashion", f"data.root={mnist_root}", f"hydra.run.dir={folder}")
    assert result.code == 0, result.err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["data"] == "fashionmnist"
    result = run_main(folder, "--output", tmp_path / "out", main=evaluate.main)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["accuracy"] == pytest.approx(metrics["metrics"]["test/acc"]) and "Ankle boot" in result.out

    splits = TorchvisionDataset("FashionMNIST").load(mnist_root)
    images, labels = splits.test[:]
    (tmp_path / "images").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"images/{i:03}.png")
    result = run_main(tmp_path / "images", "--weights", folder, "--json", main=predict.main)
    predicted = [splits.classes.index(answer["class"]) for answer in json.loads(result.out)]
    assert (torch.tensor(predicted) == labels).float().mean().item() == pytest.approx(scores["accuracy"])

    pytest.importorskip("onnxruntime")
    result = run_main(folder, "--output", tmp_path / "out", main=export.main)
    assert result.code == 0 and (tmp_path / "out/fashionmnist.onnx").exists(), result.err
