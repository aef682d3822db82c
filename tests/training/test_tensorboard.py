import json
from pathlib import Path
from unittest.mock import Mock

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from src.data.datamodule import ImageDataModule
from src.data.datasets import Digits
from src.models.cnn import CNN
from src.training.tensorboard_callback import TensorBoardCallback

TINY = "model.channels=[4,4,4,4,4,4]", "data=digits", "optimizer.lr=0.05", "trainer.log_every_n_steps=5"


def train(run_main, folder: Path, *overrides: str) -> EventAccumulator:
    result = run_main(*TINY, "trainer.max_epochs=1", f"hydra.run.dir={folder}", *overrides)
    assert result.code == 0 and "warning" not in result.err.lower(), result.err
    return EventAccumulator(str(folder), size_guidance={"tensors": 0, "histograms": 0}).Reload()


def read_weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([state[f"net.{name}"].flatten() for name, _ in CNN([4] * 6).named_parameters()])


def test_run_fills_every_tab_with_accuracies_in_percent(run_main, tmp_path):
    events = train(run_main, tmp_path, "trainer.max_epochs=2")
    tags = events.Tags()
    images = {"train/augmented batch", "weights/conv1 filters", "test/confusion matrix", "test/worst mistakes"}
    assert images == {*tags["images"]}
    assert {"weights/conv1.0.weight", "weights/fc.bias"} <= set(tags["histograms"])
    assert len(events.Histograms("weights/fc.bias")) == len(events.Images("weights/conv1 filters")) == 2
    assert "custom_scalars__config__" in tags["tensors"]
    assert tags["graph"]
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert not {"epoch", "val/acc"} & set(tags["scalars"])
    assert events.Scalars("val/acc %")[-1].value == pytest.approx(100 * metrics["val/acc"])
    assert events.Scalars("val/loss")[-1].value == pytest.approx(metrics["val/loss"])


def test_finished_training_is_tested_again_with_plots(run_main, tmp_path):
    train(run_main, tmp_path)
    (tmp_path / "metrics.json").unlink()  # as if killed during the test
    for overrides in [], ["test=best"]:
        result = run_main(f"resume={tmp_path}", *overrides)
        assert result.code == 0, result.err
    assert "test/best/acc" in json.loads((tmp_path / "metrics.json").read_text())["metrics"]


def test_run_without_the_callback_gives_bitwise_identical_weights(run_main, tmp_path):
    train(run_main, tmp_path / "with", "model.dropout=0.1")
    assert not train(run_main, tmp_path / "without", "model.dropout=0.1", "callbacks.tensorboard=null").Tags()["images"]
    assert torch.equal(read_weights(tmp_path / "with"), read_weights(tmp_path / "without"))


class VAE(L.LightningModule):
    """Calls itself twice per test batch, by keyword, and changes its outputs' shape: no classification."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.frozen = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1).eval()

    def forward(self, x):
        return self.frozen(self.net(x))

    def training_step(self, batch, batch_idx):
        return (self(x=batch[0]) - batch[0]).square().mean()

    def test_step(self, batch, batch_idx):
        self.log("test/mse", (self(x=self(x=batch[0])) - batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


@pytest.mark.parametrize("fails", [False, True])
def test_other_task_has_fewer_plots_and_a_failing_plot_is_one_warning(fails, tmp_path, monkeypatch, recwarn):
    data, module = ImageDataModule(Digits()), VAE()
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    limits = {"max_epochs": 2, "limit_train_batches": 3, "limit_test_batches": 1, "log_every_n_steps": 1}
    logger, callbacks = TensorBoardLogger(tmp_path, name=""), [TensorBoardCallback()]
    if fails:
        monkeypatch.setattr(logger.experiment, "add_image", Mock(side_effect=OSError("disk is full")))
    trainer = L.Trainer(logger=logger, accelerator="cpu", callbacks=callbacks, **options, **limits)
    trainer.fit(module, data)
    assert not module.frozen.training
    trainer.test(module, data, verbose=False)
    tags = EventAccumulator(logger.log_dir).Reload().Tags()
    images = [] if fails else ["train/augmented batch", "weights/conv1 filters"]
    assert "test/mse" in tags["scalars"] and tags["images"] == images
    messages = {str(warning.message) for warning in recwarn if "TensorBoard" in str(warning.message)}
    plots = ("the augmented batch", "histograms and filters") if fails else ()
    assert messages == {f"TensorBoard lacks {plot} (OSError: disk is full)" for plot in plots}
