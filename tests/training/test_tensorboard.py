import json
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from src.models.cnn import CNN
from src.training import tensorboard

TINY = "model.channels=[4,4,4,4,4,4]", "data=digits", "optimizer.lr=0.05", "trainer.log_every_n_steps=5"


def train(run_main, folder: Path, *overrides: str) -> EventAccumulator:
    result = run_main(*TINY, "trainer.max_epochs=1", f"hydra.run.dir={folder}", *overrides)
    assert result.code == 0 and "warning" not in result.err.lower(), result.err
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


def read_weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([state[f"net.{name}"].flatten() for name, _ in CNN([4] * 6).named_parameters()])


def test_run_fills_every_tab_with_accuracies_in_percent(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorboard, "PROJECTOR_IMAGES", 100)
    events = train(run_main, tmp_path, "trainer.max_epochs=2")
    tags = events.Tags()
    assert {"augmented batch", "conv1 filters", "test/confusion matrix", "test/worst mistakes"} == {*tags["images"]}
    assert {"weights/conv1.0.weight", "weights/fc.bias", "activations/conv3.4"} <= set(tags["histograms"])
    assert len(events.Histograms("activations/conv3.4")) == len(events.Images("conv1 filters")) == 2
    assert {"config/text_summary", "layers/text_summary", "test/digit 9", "custom_scalars__config__"} <= {
        *tags["tensors"]
    }
    assert "max_epochs: 2" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [event.step for event in events.Scalars("gradient norm")] == list(range(4, 2 * 41, 5))
    assert tags["graph"]
    (projection,) = tmp_path.glob("*/test/tensors.tsv")
    assert len(projection.read_text().splitlines()) == 100
    assert (projection.parent / "metadata.tsv").read_text().startswith("digit\tpredicted as\n")
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert not {"epoch", "val/acc"} & set(tags["scalars"])
    assert events.Scalars("val/acc %")[-1].value == pytest.approx(100 * metrics["val/acc"])
    assert events.Scalars("val/loss")[-1].value == pytest.approx(metrics["val/loss"])


def test_run_without_the_callback_gives_bitwise_identical_weights(run_main, tmp_path):
    train(run_main, tmp_path / "with", "model.dropout=0.1")
    assert not train(run_main, tmp_path / "without", "model.dropout=0.1", "callbacks.tensorboard=null").Tags()["images"]
    assert torch.equal(read_weights(tmp_path / "with"), read_weights(tmp_path / "without"))


def test_gradient_norm_is_the_step_over_the_learning_rate(run_main, tmp_path):
    plain = "optimizer.momentum=0", "optimizer.nesterov=false", "optimizer.weight_decay=0", "scheduler=none"
    limits = "trainer.max_steps=1", "trainer.log_every_n_steps=1", "optimized_metric=null", "callbacks.best=null"
    events = train(run_main, tmp_path, *plain, *limits, "trainer.gradient_clip_val=null")
    after = read_weights(tmp_path)
    L.seed_everything(0, verbose=False)
    step = after - torch.cat([p.detach().flatten() for p in CNN([4] * 6, 0.0).parameters()])
    assert events.Scalars("gradient norm")[0].value == pytest.approx(step.norm().item() / 0.05, rel=1e-3)


def test_failing_plot_is_a_warning_and_frozen_layers_stay_frozen(monkeypatch):
    net = nn.Sequential(nn.Conv2d(1, 1, 3), nn.BatchNorm2d(1), nn.ReLU())
    net[1].eval()
    callback, trainer, task = tensorboard.TensorBoardCallback(), Mock(global_step=0), SimpleNamespace(net=net)
    callback.writer, callback.images = Mock(), torch.zeros(2, 1, 5, 5)
    callback.on_train_epoch_end(trainer, task)
    callback.writer.add_image.assert_called_once()
    callback.writer.add_histogram.side_effect = [*[None] * 4, OSError("disk is full")]
    with pytest.warns(UserWarning, match="TensorBoard lacks histograms and filters .disk is full"):
        callback.on_train_epoch_end(trainer, task)
    assert [layer.training for layer in net.modules()] == [True, True, False, True]
