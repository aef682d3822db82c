"""A run that was stopped and continued ends with the same bits as one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.recovery import Recovery
from src.checkpoints import drop_events
from src.config import CONF

# 41 batches an epoch.
TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "model.dropout=0.2", "optimizer.lr=0.05"),
    *("trainer.max_epochs=2", "trainer.log_every_n_steps=5", "callbacks.last.every_steps=10"),
)


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing is written any more."""


@pytest.fixture
def stop(monkeypatch):
    """Makes the next run stop itself at the start of batch `at`, counted from 0 over all epochs."""
    original = Recovery.on_train_batch_start

    def at(batch, how):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.fit_loop.total_batch_idx == batch:
                monkeypatch.setattr(Recovery, "on_train_batch_start", original)
                if how is Killed:
                    raise Killed
                os.kill(os.getpid(), how)
            original(self, trainer, *arguments)

        monkeypatch.setattr(Recovery, "on_train_batch_start", on_train_batch_start)

    return at


def outcome(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        "weights": {name: tensor.tolist() for name, tensor in checkpoint["state_dict"].items()},
        "optimizer": str(checkpoint["optimizer_states"]),
        "metrics": json.loads((folder / "metrics.json").read_text())["metrics"],
        "scalars": {
            tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
        },
    }


@pytest.fixture
def whole(program, tmp_path):
    """The outcome of the same run, not stopped."""

    def run(*overrides):
        assert program(*TINY, f"hydra.run.dir={tmp_path / 'whole'}", *overrides).code == 0
        return outcome(tmp_path / "whole")

    return run


@pytest.mark.parametrize("batch", [0, 1, 10, 33, 40, 41, 42, 81])
def test_a_killed_run_continues_to_the_same_bits(program, tmp_path, stop, whole, batch):
    folder = tmp_path / "run"
    stop(batch, Killed)
    with pytest.raises(Killed):
        program(*TINY, f"hydra.run.dir={folder}")
    result = program(f"resume={folder}")
    assert result.code == 0, result.err
    assert outcome(folder) == whole()
