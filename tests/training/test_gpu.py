"""Without a GPU: on a CUDA runtime that computes nothing, where the folder of one lies beside the project or FAKECUDA
names it; under it PyTorch's dispatch, device checks, allocator, generators and graph capture are the real ones."""

import json
import os
import subprocess
import sys
from pathlib import Path
from time import monotonic
from types import SimpleNamespace

import numpy
import pytest
import torch
from conftest import read_outcome
from filelock import FileLock
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from src.runs import graph

from src import tune
from src.core.config import ROOT
from src.core.error_messages import describe_error
from src.models.classifier import move_to_device
from src.models.cnn import CNN
from src.models.separable_cnn import SeparableCNN
from src.training.resume import ResumeCheckpoint
from src.training.run_record import get_device_name

SHORT = (
    *("data=digits", "data.batch_size=32", "trainer.max_epochs=2", "trainer.limit_train_batches=20"),
    *("trainer.log_every_n_steps=7", "callbacks.model_summary=null"),
)
TINY = *SHORT, "model.channels=[4,4,4,4,4,4]"
PLAIN = ("callbacks.tensorboard=null",)  # half of so short a run
GPU = "trainer.accelerator=gpu", *PLAIN, "trainer.max_epochs=1"
DECAY = "data.augment.fade_out=0.5", "data.augment.elastic=0.5", "model.dropout=0.2", "optimizer=muon"


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
    monkeypatch.setattr(graph.CUDAGraphStrategy, "setup", setup)
    return replays


@pytest.mark.parametrize(
    "how", [DECAY, (*PLAIN, "optimizer=muon", "data.augment=null", "trainer.limit_train_batches=1.0")]
)
def test_a_replayed_step_is_the_step_to_the_last_bit(run_main, tmp_path, on_cpu, how):
    outcomes = []
    for name, further in {"eager": (), "graph": ("trainer=cuda_graph", "trainer.accelerator=cpu")}.items():
        result = run_main(*TINY, *how, *further, f"hydra.run.dir={tmp_path / name}")
        assert result.code == 0, result.err
        outcomes.append(read_outcome(tmp_path / name))
    assert len(on_cpu) > 20
    assert outcomes[0] == outcomes[1]


def test_a_run_of_replayed_steps_continues_to_the_same_bits(run_main, tmp_path, on_cpu, interrupt_at):
    arguments = *TINY, *DECAY, *PLAIN, "trainer=cuda_graph", "trainer.accelerator=cpu"
    run_main(*arguments, f"hydra.run.dir={tmp_path / 'whole'}")
    interrupt_at(12, 15)
    assert run_main(*arguments, f"hydra.run.dir={tmp_path / 'run'}").code == 143
    result = run_main(f"resume={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert read_outcome(tmp_path / "run") == read_outcome(tmp_path / "whole")


# Runs each list of arguments in one process: what it says, and per step the GPU's operations and the host's waits.
DRIVER = """
import contextlib, ctypes, io, json, os, sys
lib = ctypes.CDLL(None)
kinds = {name: ctypes.c_long.in_dll(lib, "fake_" + name) for name in "kernels libs memset h2d d2h d2d syncs".split()}
from src import train, tune
from src.models import classifier
from src.models.cnn import CNN
from src.training.resume import Recovery
import torch

original, forward, marks = Recovery.on_train_batch_end, CNN.forward, {}
def on_train_batch_end(self, trainer, *arguments):
    original(self, trainer, *arguments)
    marks[trainer.fit_loop.total_batch_idx] = {name: kind.value for name, kind in kinds.items()}
    if os.environ.get("STOP") == str(trainer.fit_loop.total_batch_idx):
        os.kill(os.getpid(), 15)
def looks(self, images):
    return forward(self, images) * (1 if images.sum().item() == 0 else 2)
Recovery.on_train_batch_end = on_train_batch_end
classifier.gives_log_probabilities = lambda *_: True  # of outputs that nothing has computed

results = {}
for name, arguments in json.load(sys.stdin).items():
    further = [one.partition(":") for one in arguments if ":" in one.partition("=")[0]]
    os.environ |= {key: value for key, _, value in further if key.isupper()}
    CNN.forward = looks if "looks:" in arguments else forward
    main = tune.main if "tune:" in arguments else train.main
    sys.argv = ["train.py", *(one for one in arguments if ":" not in one.partition("=")[0])]
    out, err, code = io.StringIO(), io.StringIO(), 0
    marks.clear()
    torch.cuda.empty_cache()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    per_step = {}
    if 18 in marks:  # from the 15th step, which logs, to the 20th, which does not
        own = {kind: (marks[18][kind] - marks[14][kind]) / 4 for kind in kinds}
        per_step = {"waits": own.pop("syncs"), "operations": sum(own.values())}
    left = torch.cuda.memory_allocated() >> 20
    results[name] = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "left": left, **per_step}
    for key, _, _ in further:
        os.environ.pop(key, None)
print("RESULTS", json.dumps(results))
"""


def stub() -> Path:
    folder = Path(os.environ.get("FAKECUDA", ROOT.parent / "shared/fakecuda"))
    if not (folder / "run").is_file():
        pytest.skip("no CUDA runtime that computes nothing: FAKECUDA names no folder of one")
    return folder / "run"


@pytest.fixture(scope="module")
def on_stub(tmp_path_factory):
    """Runs a script of Python on the stub."""
    run, shared = stub(), tmp_path_factory.getbasetemp().parent  # of all workers of pytest-xdist
    environment = os.environ | {"TMPDIR": os.environ.get("TMPDIR", str(shared)), "OMP_NUM_THREADS": "1"}

    def python(*arguments, given="", **further):
        command = [str(run), sys.executable, *map(str, arguments)]
        whole = environment | further
        return subprocess.run(command, input=given, env=whole, cwd=ROOT, capture_output=True, text=True, timeout=500)

    with FileLock(shared / "fakecuda.lock"):  # it builds itself once
        built = python("-c", "import torch; assert torch.cuda.is_available()")
    if built.returncode:
        pytest.skip(f"the CUDA runtime that computes nothing does not build here: {built.stderr.strip()[-200:]}")
    return python


@pytest.fixture(scope="module")
def runs(on_stub, tmp_path_factory, small_weights):
    """By name, what came of each run on the stub, and their folder."""
    folder = tmp_path_factory.mktemp("stub")
    teacher = f"+data.soft_labels.teacher={{_target_:src.distillation.ensemble.Ensemble,files:['{small_weights}']}}"
    reinforce = (
        "+data.soft_labels._target_=src.distillation.soft_labels.SoftLabels",
        f"+data.soft_labels.folder={folder / 'answers'}",
    )
    generator = numpy.random.default_rng(0)
    sets = {
        f"{name}_{kind}": generator.integers(256 if kind == "images" else 10, size=(count, *shape), dtype="uint8")
        for name, count in {"train": 720, "test": 40}.items()
        for kind, shape in {"images": (32, 32, 3), "labels": ()}.items()
    }
    numpy.savez(folder / "coloured.npz", **sets)
    coloured = "data=npz", f"data.root={folder / 'coloured.npz'}"
    resnet = "~model.channels", "~model.dropout", "~model.blur", "model._target_=torchvision.models.resnet18"
    stopped = "optimizer.momentum=0", "optimizer.nesterov=false", "STOP:9"  # what nothing has computed is not kept
    cases = {
        "sgd": (),
        "muon": ("optimizer=muon", "callbacks.tensorboard=null"),
        "64-true": ("trainer.precision=64-true",),
        "bf16-true": ("trainer.precision=bf16-true",),
        "16-mixed": ("trainer.precision=16-mixed", "trainer.deterministic=true"),
        "fused": ("trainer.precision=16-mixed", "+optimizer.fused=true"),
        "full": ("FAKE_OOM:1",),
        "teacher": (*reinforce, teacher, "data.augment.elastic=1"),
        "stopped": stopped,
        "again": ("STOP:9",),
        "graph": ("trainer=cuda_graph", "optimizer=muon"),
        "graph sgd": ("trainer=cuda_graph",),
        "graph separable": ("trainer=cuda_graph", "model=separable_cnn"),
        "graph resnet18": ("trainer=cuda_graph", *resnet, *coloured),
        "graph refused": ("trainer=cuda_graph", "looks:"),
        "graph 16-mixed": ("trainer=cuda_graph", "trainer.precision=16-mixed"),
        "graph stopped": ("trainer=cuda_graph", "optimizer=muon", "STOP:9"),
    }
    arguments = {}
    for name, own in cases.items():
        small = SHORT if "resnet" in name or "separable" in name else TINY
        arguments[name] = [*small, *GPU, *own, f"hydra.run.dir={folder / name.replace(' ', '_')}"]
    arguments["resumed"] = [f"resume={folder / 'again'}"]
    arguments["graph resumed"] = [f"resume={folder / 'graph_stopped'}"]
    arguments["multirun"] = ["-m", *TINY, *GPU, "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={folder / 'multirun'}"]
    arguments["tune"] = ["tune:", *TINY, *GPU, "n_trials=2", f"hydra.run.dir={folder / 'tune'}"]
    done = on_stub("-c", DRIVER, given=json.dumps(arguments))
    assert "RESULTS" in done.stdout, done.stderr
    return json.loads(done.stdout.rpartition("RESULTS")[2]) | {"folder": folder}


@pytest.mark.slow
def test_a_gpu_trains_tests_stops_and_continues(runs):
    wanted = "sgd", "muon", "64-true", "bf16-true", "16-mixed", "teacher", "resumed", "multirun", "tune"
    assert {name: runs[name]["err"] for name in wanted if runs[name]["code"]} == {}
    assert runs["stopped"]["code"] == 143
    assert "Fake H100" in json.loads((runs["folder"] / "sgd/metrics.json").read_text())["device"]
    assert all(runs[name]["left"] < 1 for name in ("sgd", "multirun")), "memory is kept from job to job"


@pytest.mark.slow
def test_a_step_waits_for_nothing(runs):
    assert {runs[name]["waits"] for name in ("sgd", "muon", "64-true", "teacher", "graph", "graph separable")} == {0}
    assert runs["sgd"]["operations"] < 150 and runs["muon"]["operations"] < 200 and runs["graph"]["operations"] < 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, words",
    [
        ("fused", "a fused optimizer cannot clip"),
        ("full", "out of memory with data.batch_size=32; halve it"),
        ("graph refused", "trainer=cuda_graph: this step cannot be captured"),
        ("graph 16-mixed", "set trainer.precision=bf16-mixed"),
    ],
)
def test_what_a_gpu_refuses_is_one_line(runs, name, words):
    assert runs[name]["code"] == 2 and words in runs[name]["err"].splitlines()[-1], runs[name]["err"]


@pytest.mark.slow
def test_a_step_is_captured_and_replayed(runs):
    wanted = "graph", "graph sgd", "graph separable", "graph resnet18", "graph resumed"
    assert {name: runs[name]["err"] for name in wanted if runs[name]["code"]} == {}
    assert runs["graph stopped"]["code"] == 143


@pytest.mark.slow
def test_a_run_of_a_gpu_continues_and_is_read_without_one(runs, run_main, tmp_path):
    from src import evaluate

    result = run_main(f"resume={runs['folder'] / 'stopped'}", "trainer.accelerator=cpu")
    assert result.code == 0, result.err
    best = runs["folder"] / "sgd/checkpoints/best.ckpt"
    result = run_main(best, "--output", tmp_path, main=evaluate.main)
    assert result.code == 0, result.err


@pytest.mark.slow
def test_answers_say_where_they_were_made(runs):
    names = [file.name for file in (runs["folder"] / "answers").glob("*.pt")]
    assert names and all(name.endswith("-nvidia-fake-h100-tf32.pt") for name in names)


@pytest.mark.slow
def test_two_gpus_train_and_warn_of_nothing(on_stub, tmp_path):
    """Without sync_batchnorm, which believes in numbers that nothing has computed."""
    gloo = "trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,process_group_backend:gloo}"
    arguments = *TINY, *GPU, "trainer.devices=2", gloo, f"hydra.run.dir={tmp_path / 'run'}"
    done = on_stub("-m", "src.train", *arguments, FAKE_DEVICES="2")
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr and "AccumulateGrad" not in done.stderr


def test_synchronized_batch_norm_keeps_the_shifts():
    net = SeparableCNN(stages=[[16, 16], [16, 16, 16], [16, 16]])
    assert sum(p.numel() for p in torch.nn.SyncBatchNorm.convert_sync_batchnorm(net).parameters()) == 2970


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_every_precision_trains_and_counts_right(run_main, tmp_path, precision):
    how = f"trainer.precision={precision}", "trainer.accelerator=cpu", "trainer.max_epochs=1", "optimizer=muon"
    result = run_main(*TINY, *how, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    right = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["train/acc"] * 20 * 32
    assert right == pytest.approx(round(right), abs=1e-3)


@pytest.mark.parametrize(("amx", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_the_precision_that_is_fastest_here_is_that_of_the_run(run_main, tmp_path, monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    short = *TINY, "trainer.limit_train_batches=2", "trainer.accelerator=cpu", "test=false"
    assert run_main(*short, "trainer.precision=auto", f"hydra.run.dir={tmp_path / 'run'}").code == 0
    assert f"precision: {precision}\n" in (tmp_path / "run/.hydra/config.yaml").read_text()


def test_a_study_of_several_processes_is_refused(run_main, tmp_path):
    several = "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"
    result = run_main(*TINY, *several, f"hydra.run.dir={tmp_path / 'study'}", main=tune.main)
    assert result.code == 2 and "a trial trains on one device, not on 2" in result.err.splitlines()[-1]
    assert not (tmp_path / "study/study.db").exists()


def test_a_fused_optimizer_that_cannot_clip_is_one_line():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], fused=True)
    with pytest.raises(RuntimeError) as caught:
        MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu")).clip_gradients(optimizer, 1.0)
    assert describe_error(caught.value).startswith("a fused optimizer cannot clip with trainer.precision=16-mixed")


@pytest.mark.parametrize("signal", [0, 15])
def test_processes_agree_now_and_then(monkeypatch, signal):
    recovery, asked, saved = ResumeCheckpoint("."), [], []
    recovery.saved_at, recovery.saved_step, recovery.signal = monotonic(), 0, signal
    monkeypatch.setattr(recovery, "_save", lambda trainer, between_batches: saved.append(trainer.global_step))
    reduce = lambda wish, reduce_op: asked.append(trainer.global_step) or wish  # noqa: E731
    strategy = SimpleNamespace(reduce=reduce, root_device=torch.device("cpu"))
    trainer = SimpleNamespace(world_size=2, log_every_n_steps=10, accumulate_grad_batches=1, strategy=strategy)
    stopped = None
    for trainer.global_step in range(1, 31):
        try:
            recovery.on_train_batch_start(trainer, None, None, 0)
        except SystemExit as stop:
            stopped = stop.code
            break
    assert (asked, saved, stopped) == (([10], [10], 143) if signal else ([10, 20, 30], [], None))


def test_mps_is_told_apart_from_the_cpu(monkeypatch):
    speed = pytest.importorskip("src.benchmark.speed")  # it may be deleted
    made_on = pytest.importorskip("src.distillation.soft_labels")._made_on
    device, calls = torch.device("mps"), []
    module = SimpleNamespace(synchronize=lambda: calls.append("synchronize"))
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    speed.synchronize(device)
    assert calls == ["synchronize"]
    monkeypatch.setattr(torch.backends.mps, "get_name", lambda: "Apple M4")
    assert get_device_name(device) == "Apple M4, mps"
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)  # a processor without bfloat16
    assert made_on(device) == "-apple-m4-mps-float32" and made_on(torch.device("cpu")) == ""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *place, **how: (place, how))
    assert move_to_device(CNN(), device) == ((device,), {"memory_format": torch.contiguous_format})
    assert move_to_device(CNN(), torch.device("cpu")) == ((torch.device("cpu"),), {})
    words = (
        "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. Please use float32"
    )
    assert describe_error(TypeError(words)) == "mps has no 64-bit numbers; set trainer.accelerator=cpu"


def test_the_generator_of_mps_is_in_the_checkpoint(monkeypatch):
    state, restored = torch.ones(3, dtype=torch.uint8), []
    module = SimpleNamespace(get_rng_state=lambda: state, set_rng_state=restored.append)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    recovery, checkpoint = ResumeCheckpoint("."), {}
    on_mps = torch.nn.Module()
    on_mps.device = torch.device("mps")
    trainer = SimpleNamespace(world_size=1, callback_metrics={}, global_rank=0)
    recovery.on_save_checkpoint(trainer, on_mps, checkpoint)
    monkeypatch.setattr("src.training.resume.resumed", lambda trainer: None)
    progress = SimpleNamespace(completed=0)
    trainer.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(total=progress)))
    for device, times in {"cpu": 0, "mps": 1}.items():
        recovery.restored, on_mps.device = checkpoint["recovery"], torch.device(device)
        recovery._restore(trainer, on_mps)
        assert len(restored) == times
    assert restored[0] is state


@pytest.mark.slow
def test_the_benchmark_gives_all_figures_of_a_gpu(on_stub):
    script = f"""
import sys
from src.benchmark import speed
from src.benchmark.__main__ import main
from src.models import classifier
classifier.gives_log_probabilities = lambda *_: True
speed.at_once = lambda overrides, runs: [{{"seconds": {{"fit": 1.0}}}}] * runs
short = ["--batches", "3", "--rounds", "1", "--seeds", "2", "--runs", "2"]
sys.argv = ["benchmark.py", *{list(TINY[:1] + TINY[-2:])}, "scheduler=none", "trainer.accelerator=gpu", *short]
main()
"""
    done = on_stub("-c", script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith(("b/a", "b/c")) for line in lines) == 4
    assert sum(line.startswith("fast, batch") for line in lines) == 12
    assert sum(" after " in line and "test" in line for line in lines) == 6
    assert lines[-1].startswith("2 at once")
