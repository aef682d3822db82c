"""GPUs without one: slow tests run PyTorch on a CUDA runtime that computes nothing, in the folder FAKECUDA."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from src.core.config import CONF, ROOT
from src.models.cnn import CNN

TINY = (
    *("data=digits", "data.batch_size=32", "trainer.max_epochs=2", "trainer.limit_train_batches=20"),
    *("trainer.log_every_n_steps=7", "callbacks.model_summary=null", "model.channels=[4,4,4,4,4,4]"),
)
PLAIN = ("++callbacks.tensorboard=null",)  # halves the time of so short a run
GPU = "trainer.accelerator=gpu", *PLAIN, "trainer.max_epochs=1"
# Muon has more kernels than the others, if it is not deleted.
OPTIMIZER = f"optimizer={'muon' if (CONF / 'optimizer/muon.yaml').exists() else 'adamw'}"


# Runs each list of arguments in one process; prints its output and, per step, GPU operations and waits of the host.
DRIVER = """
import contextlib, ctypes, importlib, io, json, os, sys
lib = ctypes.CDLL(None)
kinds = {name: ctypes.c_long.in_dll(lib, "fake_" + name) for name in "kernels libs memset h2d d2h d2d syncs".split()}
from src.models.cnn import CNN
from src.training.resume import ResumeCheckpoint
import torch

original, forward, marks = ResumeCheckpoint.on_train_batch_end, CNN.forward, {}
def on_train_batch_end(self, trainer, *arguments):
    original(self, trainer, *arguments)
    marks[trainer.fit_loop.total_batch_idx] = {name: kind.value for name, kind in kinds.items()}
    if os.environ.get("STOP") == str(trainer.fit_loop.total_batch_idx):
        os.kill(os.getpid(), 15)
def read_sum(self, images):
    return forward(self, images) * (1 if images.sum().item() == 0 else 2)
ResumeCheckpoint.on_train_batch_end = on_train_batch_end

results = {}
for name, arguments in json.load(sys.stdin).items():
    settings = [argument.partition(":") for argument in arguments if ":" in argument.partition("=")[0]]
    os.environ |= {key: value for key, _, value in settings if key.isupper()}
    CNN.forward = read_sum if "read_sum:" in arguments else forward
    main = importlib.import_module(os.environ.get("PROGRAM", "src.train")).main
    sys.argv = ["train.py", *(argument for argument in arguments if ":" not in argument.partition("=")[0])]
    out, err, code = io.StringIO(), io.StringIO(), 0
    marks.clear()
    torch.cuda.empty_cache()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    # From the 15th step, which logs, to the 20th, which does not.
    counts = {kind: (marks[18][kind] - marks[14][kind]) / 4 for kind in kinds if 18 in marks}
    per_step = {"waits": counts.pop("syncs", None), "operations": sum(counts.values())}
    left = torch.cuda.memory_allocated() >> 20
    results[name] = {"code": code, "err": err.getvalue(), "left": left, **per_step}
    for key, _, _ in settings:
        os.environ.pop(key, None)
print("RESULTS", json.dumps(results))
"""


@pytest.fixture(scope="module")
def run_on_fake_gpu(tmp_path_factory):
    """Run Python on the CUDA runtime that computes nothing."""
    file = Path(os.environ.get("FAKECUDA", ROOT.parent / "shared/fakecuda")) / "run"
    shared = tmp_path_factory.getbasetemp().parent  # by all workers of pytest-xdist
    environment = {"TMPDIR": str(shared), **os.environ, "OMP_NUM_THREADS": "1"}

    def python(*arguments, stdin="", **variables):
        settings = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 500, "env": environment | variables}
        return subprocess.run([str(file), sys.executable, *map(str, arguments)], input=stdin, **settings)

    with FileLock(shared / "fakecuda.lock"):  # it builds itself once
        if not file.is_file() or python("-c", "import torch; assert torch.cuda.is_available()").returncode:
            pytest.skip("FAKECUDA names no CUDA runtime that computes nothing and builds here")
    return python


def run_cases(run_on_fake_gpu, folder: Path, cases: dict[str, tuple[str, ...]], **others: list[str]) -> dict[str, dict]:
    """Train every case on the fake GPU, in a folder of its name, then run the `others`; return results by name."""
    run_dir = f"hydra.run.dir={folder}/"
    commands = {name: [*TINY, *GPU, *case, run_dir + name.replace(" ", "_")] for name, case in cases.items()}
    done = run_on_fake_gpu("-c", DRIVER, stdin=json.dumps(commands | others))
    assert "RESULTS" in done.stdout, done.stderr
    return json.loads(done.stdout.rpartition("RESULTS")[2])


@pytest.fixture(scope="module")
def runs(run_on_fake_gpu, tmp_path_factory, small_weights):
    """Return the results of runs on the fake GPU by name, and their folder."""
    folder = tmp_path_factory.mktemp("fake_gpu")
    soft_labels = f"_target_:src.distillation.soft_labels.SoftLabels,teachers:['{small_weights}']"
    distilled = f"+data.soft_labels={{{soft_labels},folder:{folder / 'soft_labels'}}}", "data.augment.elastic=1"
    distilled = distilled if find_spec("src.distillation") else ()
    cases = {
        "sgd": (),
        "optimizer": (OPTIMIZER,),
        "64-true": ("trainer.precision=64-true",),
        "bf16-true": ("trainer.precision=bf16-true",),
        "16-mixed": ("trainer.precision=16-mixed", "trainer.deterministic=true"),
        "out of memory": ("FAKE_OOM:1",),
        "distilled": distilled,
        "stopped": ("optimizer.momentum=0", "optimizer.nesterov=false", "STOP:9"),  # momentum would be rubbish
        "stopped again": ("STOP:9",),
    }
    cases |= {"tune": ("PROGRAM:src.tune", "n_trials=2")} if find_spec("src.tune") else {}
    sweep = ["-m", *TINY, *GPU, "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={folder / 'multirun'}"]
    results = run_cases(run_on_fake_gpu, folder, cases, resumed=[f"resume={folder}/stopped_again"], multirun=sweep)
    return results | {"folder": folder}


@pytest.mark.slow
def test_gpu_trains_tests_stops_and_resumes(runs, run_main):
    failed = {name: runs[name]["code"] for name in runs if name != "folder" and runs[name]["code"]}
    assert failed == {"out of memory": 2, "stopped": 143, "stopped again": 143}, [runs[name]["err"] for name in failed]
    assert "Fake H100" in json.loads((runs["folder"] / "sgd/metrics.json").read_text())["device"]
    assert all(runs[name]["left"] < 1 for name in ("sgd", "multirun")), "memory is kept from job to job"
    assert any((runs["folder"] / "soft_labels").glob("*.pt")) == bool(find_spec("src.distillation"))
    assert "out of memory; halve data.batch_size" in runs["out of memory"]["err"].splitlines()[-1]
    result = run_main(f"resume={runs['folder'] / 'stopped'}", "trainer.accelerator=cpu")  # without a GPU
    assert result.code == 0, result.err


@pytest.mark.slow
def test_step_does_not_wait_for_the_gpu(runs):
    names = "sgd", "optimizer", "64-true", "distilled"
    assert {name: runs[name]["waits"] for name in names} == dict.fromkeys(names, 0)
    assert runs["sgd"]["operations"] < 150 and runs["optimizer"]["operations"] < 200


@pytest.mark.slow
def test_two_gpus_train_without_warnings(run_on_fake_gpu, tmp_path):
    """Without sync_batchnorm, which reads numbers that are not computed."""
    gloo = "trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,process_group_backend:gloo}"
    arguments = *TINY, *GPU, "trainer.devices=2", gloo, f"hydra.run.dir={tmp_path / 'run'}"
    done = run_on_fake_gpu("-m", "src.train", *arguments, FAKE_DEVICES="2")
    assert done.returncode == 0, done.stderr
    assert "strides" not in done.stderr and "AccumulateGrad" not in done.stderr


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_every_precision_trains_and_counts_correctly(run_main, tmp_path, precision):
    overrides = f"trainer.precision={precision}", "trainer.accelerator=cpu", "trainer.max_epochs=1", OPTIMIZER
    result = run_main(*TINY, *overrides, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    correct = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["train/acc"] * 20 * 32
    assert correct == pytest.approx(round(correct), abs=1e-3)


@pytest.mark.parametrize(("amx", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_auto_is_the_fastest_of_this_processor(run_main, tmp_path, monkeypatch, amx, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": amx}, raising=False)
    short = *TINY, "trainer.limit_train_batches=2", "trainer.accelerator=cpu", "test=false"
    assert run_main(*short, "trainer.precision=auto", f"hydra.run.dir={tmp_path / 'run'}").code == 0
    assert f"precision: {precision}\n" in (tmp_path / "run/.hydra/config.yaml").read_text()


def test_cnn_is_contiguous_if_there_is_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert CNN().conv1[0].weight.is_contiguous()
