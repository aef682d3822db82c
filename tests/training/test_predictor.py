import json
import pickle

import pytest
import torch

from src import evaluate
from src.core.errors import UserError
from src.data.image_spec import MNIST_SPEC
from src.models.cnn import CNN
from src.training.predictor import SHIPPED_WEIGHTS, load_predictor

CHANNELS = [4, 4, 4, 4, 4, 4]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a tiny network on the digits."""
    import sys

    from src import train

    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        overrides = "data=digits", f"model.channels={CHANNELS}".replace(" ", ""), "trainer.max_epochs=1"
        patch.setattr(sys, "argv", ["train", *overrides, f"hydra.run.dir={folder}"])
        train.main()
    return folder


def test_run_folder_checkpoint_and_pt_file_give_the_same_network(run, tmp_path):
    from_folder, from_checkpoint = load_predictor(run), load_predictor(run / "checkpoints/last.ckpt")
    state = from_folder.net.state_dict()
    model = {"_target_": ".models.cnn.CNN", "channels": CHANNELS, "dropout": 0.0}
    torch.save({"state_dict": state, "model": model, "data": MNIST_SPEC.to_dict()}, tmp_path / "net.pt")
    images = torch.randn(3, 1, 28, 28)
    expected = from_folder.net(images)
    assert (
        from_folder.spec == from_checkpoint.spec and from_folder.spec.name == "digits" and not from_folder.net.training
    )
    assert torch.equal(from_checkpoint.net(images), expected)
    assert torch.equal(load_predictor(tmp_path / "net.pt").net(images), expected)


def test_evaluation_repeats_the_scores_of_the_run(run, run_main, tmp_path):
    result = run_main(run, "--output", tmp_path / "out", main=evaluate.main)
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())["metrics"]
    assert scores["data"] == "digits" and scores["images"] == 360
    assert scores["accuracy"] == pytest.approx(metrics["test/acc"])
    assert scores["loss"] == pytest.approx(metrics["test/loss"], rel=1e-4)
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"scores.json", "confusion.png", "mistakes.png"}
    assert f"{scores['accuracy']:.2%}" in result.out and f"folder {tmp_path / 'out'}" in result.out


@pytest.mark.mnist
@pytest.mark.parametrize(
    "file",
    [file for file in sorted(SHIPPED_WEIGHTS.parent.glob("*.pt")) if "." not in file.stem],
    ids=lambda file: file.stem,
)
def test_the_shipped_weights_score_what_their_run_did(run_main, real_mnist, tmp_path, file):
    result = run_main(file, "--root", real_mnist, "--output", tmp_path, main=evaluate.main)
    assert result.code == 0, result.err
    recorded = json.loads(file.with_suffix(".json").read_text())["metrics"]
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["images"] == 10_000
    assert found["accuracy"] >= recorded["test/acc"] - 1e-4  # one image may fall to the other side on another machine
    assert found["loss"] == pytest.approx(recorded["test/loss"], rel=1e-3)


def test_scores_by_hand():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    labels = torch.tensor([0, 1, 1, 0])
    scores = evaluate.compute_scores(probabilities.log(), labels)
    assert scores["accuracy"] == 0.5 and scores["accuracy_by_class"] == [0.5, 0.5]
    assert scores["confusion_matrix"] == [[1, 1], [1, 1]]
    assert scores["loss"] == pytest.approx(-(torch.tensor([0.9, 0.4, 0.8, 0.3]).log().mean().item()))
    # Each image lies in a bin of its own: the mean of |1-0.9|, |0-0.6|, |1-0.8|, |0-0.7|.
    assert scores["calibration_error"] == pytest.approx(0.4)
    assert [mistake["index"] for mistake in scores["worst_mistakes"]] == [3, 1]
    assert "0       2         1    50.00%  1" in evaluate.format_scores(scores)


class Evil:
    def __reduce__(self):
        import os

        return os.system, ("touch evil",)


def model(**settings):
    return {"_target_": ".models.cnn.CNN", "channels": CHANNELS, "dropout": 0.0} | settings


@pytest.mark.parametrize(
    "content, words",
    [
        (Evil(), "not a file of weights"),
        ([1], "no state_dict"),
        ({"state_dict": {}, "model": model()}, "do not fit"),
        ({"state_dict": CNN(CHANNELS).state_dict(), "model": model(channels=[4, 4, 4, 4, 4, 5])}, "do not fit"),
        ({"state_dict": {}, "model": model(channels=[4])}, "six"),
        ({"state_dict": {}, "model": model(nonsense=1)}, "nonsense"),
        ({"state_dict": {}, "model": model(_target_="os.system")}, "not a class that"),
        ({"state_dict": {}, "model": model(_target_="src.models.cnn.torch.hub.load")}, "not a class that"),
        ({"state_dict": {}, "model": model(_target_="src.models.cnn.torch")}, "not a class that"),
        ({"state_dict": {}, "model": model(_target_="src.models.none.CNN")}, "not a class that"),
        ({"state_dict": {}, "model": None}, "names no network"),
        ({"state_dict": {}}, "is read beside one"),
    ],
)
def test_a_file_that_is_no_trained_network_is_refused(content, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, dict) and "model" in content:
        content["data"] = MNIST_SPEC.to_dict()
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=words):
        load_predictor(tmp_path / "x.pt")
    assert not (tmp_path / "evil").exists()


def test_a_pickle_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match="not a file of weights"):
        load_predictor(tmp_path / "x.pt")
    assert not (tmp_path / "evil").exists()


def test_a_config_names_networks_alone(run, tmp_path):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run/.hydra/config.yaml"
    text = config.read_text()
    for bad in text.replace("src.models.cnn.CNN", "os.system"), "!!python/object/apply:os.getcwd []", "[", "":
        config.write_text(bad)
        with pytest.raises(UserError):
            load_predictor(tmp_path / "run")


def test_a_sweep_folder_asks_for_one_run(run):
    with pytest.raises(UserError, match="is a sweep"):
        load_predictor(run.parent)
