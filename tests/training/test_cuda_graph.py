"""One CUDA graph per step: on the CPU with steps in the place of graphs, and on the CUDA runtime of test_gpu.py."""

from types import SimpleNamespace

import pytest
from conftest import read_outcome
from lightning.pytorch.strategies import SingleDeviceStrategy
from test_gpu import OPTIMIZER, PLAIN, TINY, run_cases, run_on_fake_gpu  # noqa: F401

from src.training.cuda_graph import CUDAGraphStrategy

RANDOM = "data.augment.fade_out=0.5", "data.augment.elastic=0.5", "model.dropout=0.2", OPTIMIZER


@pytest.fixture
def graphs_on_cpu(monkeypatch):
    """Run the step itself instead of replaying a graph of it, with the inputs that a replay would have."""
    replays = []

    def setup(self, trainer):
        self.trainer = trainer
        SingleDeviceStrategy.setup(self, trainer)

    graph = SimpleNamespace()
    graph.replay = lambda: (replays.append(1), graph.step())
    monkeypatch.setattr(CUDAGraphStrategy, "_capture", lambda self, step: setattr(graph, "step", step) or graph)
    monkeypatch.setattr(CUDAGraphStrategy, "setup", setup)
    return replays


@pytest.mark.parametrize("overrides", [RANDOM, (OPTIMIZER, "data.augment=null", "trainer.max_epochs=3")])
def test_replayed_step_is_bitwise_identical_to_an_eager_one(run_main, tmp_path, graphs_on_cpu, overrides):
    outcomes = []
    for name, strategy in {"eager": (), "graph": ("trainer=cuda_graph", "trainer.accelerator=cpu")}.items():
        result = run_main(*TINY, *overrides, *strategy, f"hydra.run.dir={tmp_path / name}")
        assert result.code == 0, result.err
        outcomes.append(read_outcome(tmp_path / name))
    assert len(graphs_on_cpu) > 20
    assert outcomes[0] == outcomes[1]


def test_run_of_replayed_steps_resumes_bitwise(run_main, tmp_path, graphs_on_cpu, interrupt_at):
    arguments = *TINY, *RANDOM, *PLAIN, "trainer=cuda_graph", "trainer.accelerator=cpu"
    run_main(*arguments, f"hydra.run.dir={tmp_path / 'uninterrupted'}")
    interrupt_at(12, 15)
    assert run_main(*arguments, f"hydra.run.dir={tmp_path / 'run'}").code == 143
    result = run_main(f"resume={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert read_outcome(tmp_path / "run") == read_outcome(tmp_path / "uninterrupted")


@pytest.mark.slow
def test_graphs_train_stop_and_resume_and_what_cannot_be_captured_is_one_line(run_on_fake_gpu, tmp_path):  # noqa: F811
    cases = {
        "graph": (OPTIMIZER,),
        "sgd": (),
        "refused": ("read_sum:",),
        "fp16": ("trainer.precision=16-mixed",),
        "stopped": (OPTIMIZER, "STOP:9"),
    }
    cases = {name: ("trainer=cuda_graph", *case) for name, case in cases.items()}
    runs = run_cases(run_on_fake_gpu, tmp_path, cases, resumed=[f"resume={tmp_path}/stopped"])
    codes = {"graph": 0, "sgd": 0, "refused": 2, "fp16": 2, "stopped": 143, "resumed": 0}
    assert {name: run["code"] for name, run in runs.items()} == codes, runs
    assert "trainer=cuda_graph: this step cannot be captured" in runs["refused"]["err"].splitlines()[-1]
    assert "set trainer.precision=bf16-mixed" in runs["fp16"]["err"].splitlines()[-1]
    assert runs["graph"]["waits"] == 0 and runs["graph"]["operations"] < 10
