import json
from types import SimpleNamespace

import pytest
import torch
from conftest import outcome
from lightning.pytorch.strategies import SingleDeviceStrategy

from src.runs import graph

TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "data.batch_size=32", "trainer.max_epochs=2"),
    *("trainer.limit_train_batches=20", "trainer.log_every_n_steps=7", "callbacks.layers=null"),
)
DECAY = "data.augment.decay=0.5", "data.augment.elastic=0.5", "model.dropout=0.2", "optimizer=muon"


@pytest.fixture
def on_cpu(monkeypatch):
    """In the place of a CUDA graph, the same step: from its static batch, its kept generator, its rates in tensors."""
    replays = []

    def captured(step, generators):
        return SimpleNamespace(replay=lambda: (replays.append(1), step()))

    def setup(self, trainer):
        self.trainer = trainer
        SingleDeviceStrategy.setup(self, trainer)

    monkeypatch.setattr(graph, "captured", captured)
    monkeypatch.setattr(graph.GraphStrategy, "setup", setup)
    return replays


@pytest.mark.parametrize("how", [DECAY, ("optimizer=muon", "data.augment=null", "trainer.limit_train_batches=1.0")])
def test_a_replayed_step_is_the_step_to_the_last_bit(program, tmp_path, on_cpu, how):
    outcomes = []
    for name, further in {"eager": (), "graph": ("trainer=graph", "trainer.accelerator=cpu")}.items():
        result = program(*TINY, *how, *further, f"hydra.run.dir={tmp_path / name}")
        assert result.code == 0, result.err
        outcomes.append(outcome(tmp_path / name))
    assert len(on_cpu) > 20
    assert outcomes[0] == outcomes[1]


def test_a_run_of_replayed_steps_continues_to_the_same_bits(program, tmp_path, on_cpu, stop):
    arguments = *TINY, *DECAY, "trainer=graph", "trainer.accelerator=cpu"
    program(*arguments, f"hydra.run.dir={tmp_path / 'whole'}")
    stop(12, 15)
    assert program(*arguments, f"hydra.run.dir={tmp_path / 'run'}").code == 143
    result = program(f"resume={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
