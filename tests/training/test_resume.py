"""A run that was stopped and continued ends with the same bits as one that was not."""

import errno
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SimulatedKill, read_outcome

from src.core.config import CONF

# 24 batches of training.
TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "model.dropout=0.2", "optimizer.lr=0.05"),
    *("trainer.max_epochs=2", "trainer.limit_train_batches=12", "trainer.log_every_n_steps=3"),
    *("data.batch_size=8", "callbacks.resume.every_steps=5"),
)
PLAIN = "callbacks.tensorboard=null"  # half of so short a run


@pytest.fixture(scope="module")
def outcomes():
    return {}


@pytest.fixture
def whole(run_main, tmp_path, outcomes):
    """The read_outcome of the same run, not stopped."""

    def run(*overrides):
        if overrides not in outcomes:
            assert run_main(*TINY, f"hydra.run.dir={tmp_path / 'whole'}", *overrides).code == 0
            outcomes[overrides] = read_outcome(tmp_path / "whole")
        return outcomes[overrides]

    return run


@pytest.mark.parametrize("batch", [0, 8, 11, 12, 13, 23])
def test_a_killed_run_continues_to_the_same_bits(run_main, tmp_path, interrupt_at, whole, batch):
    folder = tmp_path / "run"
    interrupt_at(batch, SimulatedKill)
    with pytest.raises(SimulatedKill):
        run_main(*TINY, f"hydra.run.dir={folder}")
    result = run_main(f"resume={folder}")
    assert result.code == 0 and not result.err, result.err
    assert read_outcome(folder) == whole()


@pytest.mark.parametrize(
    "overrides",
    [
        ("trainer.val_check_interval=5",),
        ("trainer.accumulate_grad_batches=3", "callbacks.resume.every_steps=2"),
        ("trainer.max_steps=20",),
        ("+callbacks.ema._target_=lightning.pytorch.callbacks.EMAWeightAveraging", "+callbacks.ema.decay=0.9"),
        ("optimizer=adamw", "scheduler=none", "data.augment=null"),
        ("optimizer=muon", "data.augment.fade_out=1", "task.label_smoothing=0.1"),
    ],
    ids=lambda overrides: overrides[0],
)
def test_every_state_is_in_the_checkpoint(run_main, tmp_path, interrupt_at, whole, overrides):
    overrides, folder = (PLAIN, *overrides), tmp_path / "run"
    for batch in 8, 19:
        interrupt_at(batch, SimulatedKill)
        with pytest.raises(SimulatedKill):
            run_main(*((*TINY, f"hydra.run.dir={folder}", *overrides) if batch == 8 else [f"resume={folder}"]))
    assert run_main(f"resume={folder}").code == 0
    assert read_outcome(folder) == whole(*overrides)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_writes_a_checkpoint_and_says_how_to_continue(run_main, tmp_path, interrupt_at, whole, number, code):
    folder = tmp_path / "optimizer.lr=0.1,model.dropout=it's 0"  # as in a sweep, and worse
    interrupt_at(7, number)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir='{str(folder).replace(chr(39), chr(92) + chr(39))}'")
    assert result.code == code and "Traceback" not in result.err
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7
    (line,) = [line for line in result.err.splitlines() if "resume=" in line]
    assert line.startswith(f"stopped by {number.name}; continue with: python -m src.train resume=")
    assert run_main(*shlex.split(line)[shlex.split(line).index("src.train") + 1 :]).code == 0
    assert read_outcome(folder) == whole(PLAIN)


def test_a_signal_ends_a_multirun_which_continues(run_main, tmp_path, interrupt_at, whole):
    interrupt_at(7, signal.SIGTERM)
    result = run_main("-m", *TINY, PLAIN, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 143 and not (tmp_path / "seed=1").exists()
    (line,) = [line for line in result.err.splitlines() if "continue with" in line]
    command = shlex.split(line)
    assert run_main(*command[command.index("src.train") + 1 :]).code == 0
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2
    assert read_outcome(tmp_path / "seed=0") == whole(PLAIN)


def test_a_run_stopped_after_training_is_tested_and_recorded(run_main, tmp_path, monkeypatch, whole):
    import lightning as L

    folder, test = tmp_path / "run", L.Trainer.test

    def terminated(*arguments, **settings):
        monkeypatch.setattr(L.Trainer, "test", test)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(L.Trainer, "test", terminated)
    assert run_main(*TINY, PLAIN, f"hydra.run.dir={folder}").code == 143
    assert run_main(f"resume={folder}").code == 0
    assert read_outcome(folder) == whole(PLAIN)


@pytest.fixture
def stopped(run_main, tmp_path, interrupt_at) -> Path:
    """The folder of a run that has two checkpoints, of steps 5 and 10."""
    interrupt_at(11, SimulatedKill)
    with pytest.raises(SimulatedKill):
        run_main(*TINY, PLAIN, f"hydra.run.dir={tmp_path / 'run'}")
    return tmp_path / "run"


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(run_main, stopped, whole):
    newest = stopped / "checkpoints/last.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    result = run_main(f"resume={stopped}")
    assert result.code == 0 and "last.ckpt cannot be used: it is damaged" in result.err
    assert read_outcome(stopped) == whole(PLAIN)


def test_without_a_sound_checkpoint_nothing_is_touched(run_main, stopped):
    for file in (stopped / "checkpoints").iterdir():
        file.write_bytes(b"")
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and "none of its checkpoints is sound" in result.err.splitlines()[-1]
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["resume=nowhere"], "not the folder of a run"),
        (["resume={}", "optimizer.lr=3"], "leave out optimizer.lr=3"),
        (["-m", "resume={}"], "leave out -m"),
    ],
)
def test_what_resume_refuses_is_one_line(run_main, stopped, arguments, words):
    result = run_main(*(argument.format(stopped) for argument in arguments))
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
    assert not Path("nowhere").exists()


def test_a_finished_run_is_left_alone(run_main, tmp_path):
    folder = tmp_path / "run"
    run_main(*TINY, PLAIN, f"hydra.run.dir={folder}", "trainer.max_epochs=1")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    result = run_main(f"resume={folder}")
    assert result.code == 0 and "is finished" in result.out
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_full_disk_leaves_the_checkpoint_before(run_main, tmp_path, monkeypatch):
    folder, replace, done = tmp_path / "run", os.fsync, []

    def full(descriptor):
        done.append(descriptor)
        if len(done) > 3:  # the config, and two checkpoints
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir={folder}")
    assert result.code == 2 and "No space left on device; make room" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 10


def test_a_loss_that_is_not_finite_is_named(run_main, tmp_path):
    result = run_main(
        *TINY, PLAIN, f"hydra.run.dir={tmp_path / 'run'}", "optimizer.lr=1e30", "trainer.gradient_clip_val=null"
    )
    line = result.err.splitlines()[-1]
    assert result.code == 2 and "Traceback" not in result.err
    assert re.search(r"the loss is (nan|inf) at step \d \(epoch 1, batch \d\); no checkpoint yet", line)


def test_weights_that_are_not_finite_are_not_saved(run_main, tmp_path, monkeypatch):
    from src.models.classifier import Classifier

    step = Classifier.training_step

    def broken(self, batch, batch_idx):
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == 7 else loss

    monkeypatch.setattr(Classifier, "training_step", broken)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir={tmp_path / 'run'}")
    assert "the loss is nan at step 8 (epoch 1, batch 8); the last good checkpoint is" in result.err
    assert "last.ckpt (step 5)" in result.err and result.code == 2
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 5


@pytest.mark.parametrize(
    "message",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes",
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "MPS backend out of memory (MPS allocated: 9.06 GB, other allocations: 56.38 KB, max allowed: 9.07 GB)",
        None,
    ],
)
def test_out_of_memory_names_the_batch_size(run_main, tmp_path, monkeypatch, message):
    from src.models.classifier import Classifier

    def full(*_):
        raise RuntimeError(message) if message else torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Classifier, "training_step", full)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and "out of memory with data.batch_size=8" in result.err.splitlines()[-1]


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path, whole):
    """Real processes; the same in `whole` ran in this one, so equal bits also mean equal threads and flags."""
    rng, folder = random.Random(0), tmp_path / "run"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "src.train", *TINY, PLAIN, f"hydra.run.dir={folder}"]
    for _ in range(3):
        process = subprocess.Popen(command, env=environment, cwd=CONF.parent, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (folder / "layers.txt").exists():
            time.sleep(0.05)
        time.sleep(rng.uniform(0, 1.5))
        process.kill()
        process.wait()
        command = [sys.executable, "-m", "src.train", f"resume={folder}"]
    subprocess.run(command, env=environment, cwd=CONF.parent, check=True)
    assert read_outcome(folder) == whole(PLAIN)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_something_is_imported_ends_at_once(tmp_path, number, code):
    """Code that is imported may make anything of an exception."""
    lines = "import os", "try:", f"    os.kill(os.getpid(), {int(number)})", "except BaseException: pass", ""
    (tmp_path / "far.py").write_text("\n".join(lines))
    program = f"import sys; sys.argv[0] = '-m'; sys.path[:0] = {[str(CONF.parent), str(tmp_path)]}; import src, far"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (code, f"\nstopped by {number.name}\n")


def test_submitits_signal_is_passed_on_after_a_checkpoint(run_main, tmp_path, interrupt_at, whole):
    saved = []

    def requeue(number, frame):  # as submitit does
        saved.append((number, (tmp_path / "run/checkpoints/last.ckpt").exists()))
        raise SystemExit(-1)

    before = signal.signal(signal.SIGUSR2, requeue)
    try:
        interrupt_at(8, signal.SIGUSR2)
        folder = tmp_path / "run"
        assert run_main(*TINY, PLAIN, f"hydra.run.dir={folder}").code == -1
        assert saved == [(signal.SIGUSR2, True)] and signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert run_main(f"resume={folder}").code == 0
    assert read_outcome(folder) == whole(PLAIN)
