from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.data.spec import MNIST_SPEC
from src.models.cnn import CNN

TINY = "model.channels=[4,4,4,4,4,4]", "data=digits", "optimizer.lr=0.05", "trainer.log_every_n_steps=5"


def train(program, folder: Path, *overrides: str) -> EventAccumulator:
    result = program(*TINY, "trainer.max_epochs=1", f"hydra.run.dir={folder}", *overrides)
    assert result.code == 0, result.err
    assert "Warning" not in result.err
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_every_tab_has_something_to_show(program, tmp_path):
    events = train(program, tmp_path, "trainer.max_epochs=2", "+callbacks.dashboard.embedded=100")
    tags = events.Tags()
    assert {"batch as augmented", "first layer", "test/confusion", "test/worst mistakes"} <= set(tags["images"])
    assert {"weights/conv1.0.weight", "weights/fc.bias", "activations/conv3.4"} <= set(tags["histograms"])
    assert len(events.Histograms("activations/conv3.4")) == len(events.Images("first layer")) == 2
    assert {"config/text_summary", "layers/text_summary", "test/digit 9"} <= set(tags["tensors"])
    assert "custom_scalars__config__" in tags["tensors"] and tags["graph"]
    assert "max_epochs: 2" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    steps = [event.step for event in events.Scalars("gradient norm")]
    assert steps == list(range(4, 2 * 41, 5))
    (projected,) = tmp_path.glob("*/test/tensors.tsv")
    assert len(projected.read_text().splitlines()) == 100
    assert (projected.parent / "metadata.tsv").read_text().startswith("digit\tread as\n")


def test_training_goes_the_same_way_without_it(program, tmp_path):
    train(program, tmp_path / "with", "model.dropout=0.1")
    without = train(program, tmp_path / "without", "model.dropout=0.1", "callbacks.dashboard=null")
    assert not without.Tags()["images"]
    expected = weights(tmp_path / "without")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "with").items())


def test_the_gradient_norm_is_the_step_over_the_learning_rate(program, tmp_path):
    plain = (
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "optimizer.weight_decay=0",
        "scheduler=none",
        "trainer.gradient_clip_val=null",
    )
    limits = "trainer.max_steps=1", "trainer.log_every_n_steps=1", "optimized_metric=null", "callbacks.best=null"
    events = train(program, tmp_path, *plain, *limits)
    L.seed_everything(0, verbose=False)
    before, after = CNN([4] * 6, 0.0), weights(tmp_path)
    step = torch.cat([(after[f"net.{name}"] - p.detach()).flatten() for name, p in before.named_parameters()])
    (event,) = events.Scalars("gradient norm")
    assert event.value == pytest.approx(step.norm().item() / 0.05, rel=1e-3)


def test_pixels_undo_the_normalisation():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(MNIST_SPEC.pixels(MNIST_SPEC.normalize(levels)), levels)
