import json
from pathlib import Path

import lightning as L
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src import dashboard
from src.data.image_spec import MNIST_SPEC
from src.models.cnn import CNN

TINY = "model.channels=[4,4,4,4,4,4]", "data=digits", "optimizer.lr=0.05", "trainer.log_every_n_steps=5"


def train(run_main, folder: Path, *overrides: str) -> EventAccumulator:
    result = run_main(*TINY, "trainer.max_epochs=1", f"hydra.run.dir={folder}", *overrides)
    assert result.code == 0, result.err
    assert "Warning" not in result.err
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def test_every_tab_has_something_to_show(run_main, tmp_path):
    events = train(run_main, tmp_path, "trainer.max_epochs=2", "+callbacks.tensorboard.embedded=100")
    tags = events.Tags()
    assert {"batch as augmented", "first layer", "test/confusion", "test/worst mistakes"} <= set(tags["images"])
    assert {"weights/conv1.0.weight", "weights/fc.bias", "watched activations/conv3.4"} <= set(tags["histograms"])
    assert len(events.Histograms("watched activations/conv3.4")) == len(events.Images("first layer")) == 2
    assert {"config/text_summary", "layers/text_summary", "test/digit 9"} <= set(tags["tensors"])
    assert "custom_scalars__config__" in tags["tensors"] and tags["graph"]
    assert "max_epochs: 2" in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    steps = [event.step for event in events.Scalars("gradient norm")]
    assert steps == list(range(4, 2 * 41, 5))
    (projected,) = tmp_path.glob("*/test/tensors.tsv")
    assert len(projected.read_text().splitlines()) == 100
    assert (projected.parent / "metadata.tsv").read_text().startswith("digit\tread as\n")


def test_the_curves_are_in_percent_and_without_the_epoch(run_main, tmp_path):
    events = train(run_main, tmp_path)
    assert "epoch" not in events.Tags()["scalars"] and "val/acc" not in events.Tags()["scalars"]
    scores = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert events.Scalars("val/acc %")[-1].value == pytest.approx(100 * scores["val/acc"])
    assert events.Scalars("val/loss")[-1].value == pytest.approx(scores["val/loss"])


def test_the_dashboard_links_runs_by_short_names_and_knows_what_was_swept(run_main, tmp_path):
    folder, view = tmp_path / "outputs", tmp_path / "view"
    sweep = folder / "mnist/2026-11-25_01-02-03-123456_multirun"
    metric = "optimized_metric=loss/E_total"
    result = run_main("-m", "experiment=backprop", "optimizer.lr=0.1,0.5", f"hydra.sweep.dir={sweep}", metric)
    assert result.code == 0, result.err
    assert dashboard.describe(folder, view) == ["loss/E_total"]
    dashboard.link(folder, view)
    assert {path.name for path in view.iterdir() if path.is_dir()} == {"lr=0.1", "lr=0.5"}
    assert (view / "lr=0.5").resolve().parent == sweep  # as a whole: the projector opens no link out of a run
    events = EventAccumulator(str(view / "lr=0.5")).Reload()
    assert len(events.Scalars("loss/E_total")) == 100
    summary = EventAccumulator(str(view)).Reload().SummaryMetadata("_hparams_/experiment")
    content = HParamsPluginData.FromString(summary.plugin_data.content).experiment
    assert [info.name for info in content.hparam_infos] == ["optimizer.lr"]
    assert [info.name.tag for info in content.metric_infos] == ["loss/E_total"]


def test_names_say_what_differs():
    runs = [
        Path("outputs/mnist") / name
        for name in (
            "2026-11-25_01-02-03-123456_multirun/model.dropout=0.1_optimizer.lr=0.3_seed=1",
            "2026-11-25_01-05-00-000001",
        )
    ]
    assert list(dashboard.names(runs).values()) == ["11-25 01.02.03/dropout=0.1 lr=0.3 seed=1", "11-25 01.05.00"]
    assert list(dashboard.names(runs[1:]).values()) == ["11-25 01.05.00"]
    assert dashboard.names([]) == {}


def test_training_goes_the_same_way_without_it(run_main, tmp_path):
    train(run_main, tmp_path / "with", "model.dropout=0.1")
    without = train(run_main, tmp_path / "without", "model.dropout=0.1", "callbacks.tensorboard=null")
    assert not without.Tags()["images"]
    expected = weights(tmp_path / "without")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path / "with").items())


def test_the_gradient_norm_is_the_step_over_the_learning_rate(run_main, tmp_path):
    plain = (
        "optimizer.momentum=0",
        "optimizer.nesterov=false",
        "optimizer.weight_decay=0",
        "scheduler=none",
        "trainer.gradient_clip_val=null",
    )
    limits = "trainer.max_steps=1", "trainer.log_every_n_steps=1", "optimized_metric=null", "callbacks.best=null"
    events = train(run_main, tmp_path, *plain, *limits)
    L.seed_everything(0, verbose=False)
    before, after = CNN([4] * 6, 0.0), weights(tmp_path)
    step = torch.cat([(after[f"net.{name}"] - p.detach()).flatten() for name, p in before.named_parameters()])
    (event,) = events.Scalars("gradient norm")
    assert event.value == pytest.approx(step.norm().item() / 0.05, rel=1e-3)


def test_pixels_undo_the_normalisation():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(MNIST_SPEC.denormalize(MNIST_SPEC.normalize(levels)), levels)
