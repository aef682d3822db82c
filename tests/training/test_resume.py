"""A run that is interrupted and resumed ends bitwise identical to an uninterrupted one."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from conftest import SimulatedKill, read_outcome, run_with_processes

from src import train
from src.core.error_messages import describe_error
from src.training.resume import ResumeCheckpoint

TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "model.dropout=0.2", "optimizer.lr=0.05"),
    *("trainer.max_epochs=2", "trainer.limit_train_batches=12", "trainer.log_every_n_steps=3"),
    *("data.batch_size=8", "callbacks.resume.every_steps=5", "callbacks.model_summary=null"),
)
CALLBACKS = "lightning.pytorch.callbacks"
EARLY_STOPPING = f"+callbacks.stop={{_target_:{CALLBACKS}.EarlyStopping,monitor:val/loss,min_delta:9}}"
PLAIN = "++callbacks.tensorboard=null"  # halves the time of so short a run
OUTCOMES: dict[tuple, dict] = {}  # of uninterrupted runs, by their overrides


@pytest.fixture
def uninterrupted(run_main, tmp_path):
    """Return the outcome of a run that is not interrupted."""

    def run(*overrides):
        if overrides not in OUTCOMES:
            result = run_main(*TINY, f"hydra.run.dir={tmp_path / 'uninterrupted'}", *overrides)
            assert result.code == 0, result.err
            OUTCOMES[overrides] = read_outcome(tmp_path / "uninterrupted")
        return OUTCOMES[overrides]

    return run


@pytest.fixture
def kill(run_main, interrupt_at):
    """Kill a run, or a resumed one, before a batch."""

    def run(batch, *arguments):
        interrupt_at(batch, SimulatedKill)
        with pytest.raises(SimulatedKill):
            run_main(*arguments)

    return run


@pytest.mark.parametrize(
    ("batches", "overrides"),
    [
        ([0], ()),
        ([8], ()),
        ([12], ()),  # an epoch begins with this batch
        ([8, 19], ("trainer.val_check_interval=5", PLAIN)),
        ([8, 19], ("trainer.accumulate_grad_batches=3", "callbacks.resume.every_steps=2", PLAIN)),
        ([8, 19], ("trainer.max_steps=20", PLAIN)),
        ([8, 19], (f"+callbacks.ema={{_target_:{CALLBACKS}.EMAWeightAveraging,decay:0.9}}", PLAIN)),
        ([8, 19], ("trainer.plugins=[]", "name='a$b'", "callbacks.resume.dirpath=${output_dir}/kept", PLAIN)),
        ([8, 19], ("optimizer=adamw", "data.augment.fade_out=1", "task.label_smoothing=0.1", PLAIN)),
    ],
)
def test_resume_after_kill_gives_bitwise_identical_results(run_main, tmp_path, kill, uninterrupted, batches, overrides):
    folder = tmp_path / "run"
    for batch in batches:
        kill(batch, *([f"resume={folder}"] if folder.exists() else [*TINY, f"hydra.run.dir={folder}", *overrides]))
    files = list(folder.rglob("last.ckpt"))
    epoch = torch.load(files[0], weights_only=True)["epoch"] if files else 0
    result = run_main(f"resume={folder}")
    assert result.code == 0 and not result.err, result.err
    assert ("epoch 1/" in result.out) == (epoch == 0)  # it was not begun again
    assert read_outcome(folder) == uninterrupted(*overrides)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_writes_a_checkpoint_and_prints_a_command(run_main, tmp_path, interrupt_at, uninterrupted, number, code):
    folder = tmp_path / "optimizer.lr=0.1,model.dropout=0 1"  # as a sweep names it, and worse
    interrupt_at(7, number)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir='{folder}'")
    assert result.code == code and "Traceback" not in result.err
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 7
    (line,) = [line for line in result.err.splitlines() if "resume=" in line]
    assert line.startswith(f"stopped by {number.name}; continue with: python -m src.train ")
    assert run_main(*shlex.split(line)[shlex.split(line).index("src.train") + 1 :]).code == 0
    assert read_outcome(folder) == uninterrupted(PLAIN)


CONSTANT = PLAIN, "scheduler=none"


@pytest.mark.parametrize("overrides", [CONSTANT, (PLAIN, "scheduler=plateau", "trainer.accumulate_grad_batches=5")])
def test_finished_run_trains_longer_as_if_never_stopped(run_main, tmp_path, interrupt_at, uninterrupted, overrides):
    folder, longer = tmp_path / "run", ("trainer.max_epochs=2", "callbacks.resume.every_steps=4")
    assert run_main(*TINY, *overrides, "trainer.max_epochs=1", f"hydra.run.dir={folder}").code == 0
    assert "already finished" in run_main(f"resume={folder}").out
    interrupt_at(15, signal.SIGTERM)
    result = run_main(f"resume={folder}", *longer)
    assert result.code == 143 and result.err.rstrip().endswith(" ".join(longer))
    assert not (folder / "metrics.json").exists()
    assert run_main(f"resume={folder}").code == 0  # the changes are saved
    assert read_outcome(folder) == uninterrupted(*overrides)
    changed = yaml.safe_load((folder / ".hydra/overrides.yaml").read_text())
    assert changed[-2:] == list(longer) and "trainer.max_epochs=1" not in changed


@pytest.mark.parametrize("scheduler", ["onecycle", "cosine"])
@pytest.mark.parametrize("is_finished", [True, False])
def test_fixed_schedule_is_not_trained_longer(run_main, tmp_path, interrupt_at, uninterrupted, scheduler, is_finished):
    folder, arguments = tmp_path / "run", (PLAIN, f"scheduler={scheduler}", "logger=[tensorboard,csv]")
    if not is_finished:
        interrupt_at(7, signal.SIGTERM)
    run_main(*TINY, *arguments, f"hydra.run.dir={folder}")
    result = run_main(f"resume={folder}", "trainer.max_epochs=3")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "init_from=" in result.err
    assert run_main(f"resume={folder}").code == 0
    assert read_outcome(folder) == uninterrupted(*arguments)


def test_run_that_stopped_early_goes_on_with_more_patience(run_main, tmp_path):
    folder = tmp_path / "run"
    stop = EARLY_STOPPING.replace("}", ",patience:1}")
    result = run_main(*TINY, *CONSTANT, stop, "trainer.max_epochs=9", f"hydra.run.dir={folder}")
    assert result.code == 0 and "epoch 2/9" in result.out and "epoch 3/9" not in result.out
    result = run_main(f"resume={folder}", "callbacks.stop.patience=2")
    assert result.code == 0 and "epoch 3/9" in result.out and "epoch 4/9" not in result.out
    result = run_main(f"resume={folder}", "~callbacks.stop", "trainer.max_epochs=5")
    assert result.code == 0 and "epoch 5/5" in result.out


def test_second_signal_exits_without_a_checkpoint(tmp_path):
    callback = ResumeCheckpoint(str(tmp_path))
    callback._handle_signal(signal.SIGINT, None)
    with pytest.raises(SystemExit, match="143"):
        callback._handle_signal(signal.SIGTERM, None)


@pytest.mark.parametrize("overrides", [(), (EARLY_STOPPING, "trainer.max_epochs=6")], ids=["all epochs", "stops early"])
def test_stop_before_the_test_gives_identical_scores(run_main, tmp_path, monkeypatch, uninterrupted, overrides):
    import lightning as L

    from src.models.cnn import CNN

    folder, test, forward = tmp_path / "run", L.Trainer.test, CNN.forward
    monkeypatch.setattr(CNN, "forward", lambda self, images: forward(self, images + torch.randn_like(images)))

    def terminate(*_, **__):
        monkeypatch.setattr(L.Trainer, "test", test)
        os.kill(os.getpid(), signal.SIGTERM)

    noisy = PLAIN, "name=noisy", *overrides  # another key of the cache
    expected = uninterrupted(*noisy)
    monkeypatch.setattr(L.Trainer, "test", terminate)
    assert run_main(*TINY, *noisy, f"hydra.run.dir={folder}").code == 143
    assert run_main(f"resume={folder}").code == 0
    results = json.loads((folder / "metrics.json").read_text())  # with the seconds and samples of the part before
    samples = results["samples_per_second"] * results["seconds"]["fit"]
    assert samples == pytest.approx(8 * results["steps"], rel=0.02) and read_outcome(folder) == expected


def test_submitits_handler_requeues_after_a_checkpoint(run_main, tmp_path, interrupt_at, uninterrupted):
    folder, calls = tmp_path / "run", []

    def requeue(number, frame):  # as submitit's
        calls.append((number, (folder / "checkpoints/last.ckpt").exists()))
        raise SystemExit(-1)

    previous = signal.signal(signal.SIGUSR2, requeue)
    try:
        interrupt_at(8, signal.SIGUSR2)
        assert run_main(*TINY, PLAIN, f"hydra.run.dir={folder}").code == -1
        assert calls == [(signal.SIGUSR2, True)] and signal.getsignal(signal.SIGUSR2) is requeue
    finally:
        signal.signal(signal.SIGUSR2, previous)
    assert run_main(f"resume={folder}").code == 0
    assert read_outcome(folder) == uninterrupted(PLAIN)


@pytest.fixture
def killed(tmp_path, kill) -> Path:
    """A killed run with checkpoints of steps 15, 10 and the best epoch."""
    kill(17, *TINY, PLAIN, f"hydra.run.dir={tmp_path / 'run'}")
    return tmp_path / "run"


def test_moved_run_resumes_and_keeps_its_best_checkpoint(run_main, killed, uninterrupted):
    moved = killed.rename(killed.with_name("moved"))
    result = run_main(f"resume={moved}")
    assert result.code == 0 and not result.err and not killed.exists()
    assert read_outcome(moved) == uninterrupted(PLAIN)
    files = [moved / f"checkpoints/{name}.ckpt" for name in ("best", "last", "previous")]
    assert sorted((moved / "checkpoints").iterdir()) == files
    states = torch.load(files[1], weights_only=True)["callbacks"].items()
    (best,) = [state for name, state in states if name.startswith("ModelCheckpoint")]
    assert best["best_model_path"] == str(files[0]) and best["best_model_score"] is not None


@pytest.mark.parametrize("damage", ["truncated", "flipped bit", "empty"])
def test_damaged_checkpoint_is_named_and_the_previous_one_used(run_main, killed, uninterrupted, damage):
    newest = killed / "checkpoints/last.ckpt"
    content = bytearray(newest.read_bytes())
    with zipfile.ZipFile(newest) as archive:
        tensor = max(archive.infolist(), key=lambda part: part.file_size)
    content[tensor.header_offset + 300] ^= 1  # in its numbers, where torch.load finds nothing wrong
    newest.write_bytes({"truncated": content[:-1000], "flipped bit": content, "empty": b""}[damage])
    result = run_main(f"resume={killed}")
    assert result.code == 0 and f"warning: {newest}: damaged" in result.err
    assert read_outcome(killed) == uninterrupted(PLAIN)


def test_without_an_undamaged_checkpoint_resume_prints_one_error(run_main, killed):
    for file in (killed / "checkpoints").iterdir():
        file.write_bytes(b"")
    result = run_main(f"resume={killed}")
    assert result.code == 2 and "all checkpoints are damaged; start again" in result.err.splitlines()[-1]
    assert not (killed / "metrics.json").exists()


@pytest.mark.parametrize("damage", [lambda file: file.write_bytes(b""), Path.unlink], ids=["empty", "missing"])
def test_best_checkpoint_that_is_lost_is_replaced_by_a_later_one(run_main, killed, recwarn, damage):
    damage(killed / "checkpoints/best.ckpt")
    result = run_main(f"resume={killed}", "test=best")
    assert result.code == 0 and any("the best of the remaining epochs" in str(warning.message) for warning in recwarn)
    results = json.loads((killed / "metrics.json").read_text())
    assert results["best_epoch"] == 2 and results["metrics"]["test/best/acc"] == results["metrics"]["test/acc"]


def test_full_disk_leaves_the_last_checkpoint(run_main, tmp_path, monkeypatch):
    folder, synchronize, calls = tmp_path / "run", os.fsync, []

    def fail_from_third_checkpoint(descriptor):
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        if sum(".ckpt." in name for name in calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        synchronize(descriptor)

    monkeypatch.setattr(os, "fsync", fail_from_third_checkpoint)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir={folder}")
    assert result.code == 2 and "No space left on device" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 10


@pytest.mark.parametrize(
    ("step", "saved"), [(3, "no checkpoint yet"), (9, "last good checkpoint: .*last.ckpt .step 5.")]
)
def test_divergence_is_reported_with_its_step_and_not_saved(run_main, tmp_path, monkeypatch, step, saved):
    from src.models.classifier import Classifier

    original = Classifier.training_step

    def training_step(self, batch, batch_idx):
        loss = original(self, batch, batch_idx)
        return loss * float("nan") if self.global_step == step - 2 else loss

    monkeypatch.setattr(Classifier, "training_step", training_step)
    result = run_main(*TINY, PLAIN, f"hydra.run.dir={tmp_path / 'run'}")
    line = result.err.splitlines()[-1]
    assert result.code == 2 and "Traceback" not in result.err
    moment = rf"step {step} \(epoch 1, batch {step}\)"
    assert re.search(f"error: the loss is not finite at {moment}; {saved}; try a lower", line)
    file = tmp_path / "run/checkpoints/last.ckpt"
    assert torch.load(file, weights_only=True)["global_step"] == 5 if step == 9 else not file.exists()


def test_out_of_memory_names_the_batch_size():
    assert describe_error(RuntimeError("CUDA error: out of memory")) == "out of memory; halve data.batch_size"


def test_a_batch_of_one_image_names_the_batch_size():
    with pytest.raises(ValueError) as caught:
        torch.nn.BatchNorm1d(2)(torch.zeros(1, 2))
    assert "change data.batch_size" in str(describe_error(caught.value))


@pytest.mark.slow
def test_resume_of_two_processes_gives_bitwise_identical_results(tmp_path):
    arguments = *TINY, PLAIN, "trainer.accelerator=cpu", "callbacks.resume.every_steps=3"
    run_with_processes(2, *arguments, f"hydra.run.dir={tmp_path / 'uninterrupted'}")
    run_with_processes(2, *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    for name in "metrics.json", "checkpoints/last.ckpt":
        (tmp_path / "run" / name).unlink()  # the previous one is of step 21, within the second epoch
    run_with_processes(2, f"resume={tmp_path / 'run'}")
    assert read_outcome(tmp_path / "run") == read_outcome(tmp_path / "uninterrupted")


def fit_boring_model(folder: Path, loader_class: type, kill_at: int | None = None) -> tuple:
    """Fit a linear model in three epochs of five batches; return its inputs and its weights."""
    from lightning.pytorch import Trainer, seed_everything
    from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

    inputs = []

    class Model(BoringModel):
        def configure_optimizers(self):
            assert self.trainer.estimated_stepping_batches == 15  # begins the DataLoader before it has its state
            return super().configure_optimizers()

        def training_step(self, batch, batch_idx):
            if self.global_step == kill_at:
                raise SimulatedKill
            inputs.append(batch.tolist())
            return super().training_step(batch, batch_idx)

    seed_everything(0, verbose=False)
    callback, file, model = ResumeCheckpoint(str(folder), every_steps=1), folder / "last.ckpt", Model()
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=3, limit_val_batches=0, callbacks=[callback], default_root_dir=folder, **options)
    loader = loader_class(RandomDataset(32, 20), batch_size=4, shuffle=True)
    trainer.fit(model, loader, ckpt_path=file if file.exists() else None)
    return inputs, model.layer.weight.tolist()


@pytest.mark.parametrize("batch", [0, 3, 5, 7, 10])
def test_any_dataloader_resumes_with_identical_batches(tmp_path, batch):
    loader_class = torch.utils.data.DataLoader
    inputs, weights = fit_boring_model(tmp_path / "uninterrupted", loader_class)
    with pytest.raises(SimulatedKill):
        fit_boring_model(tmp_path / "run", loader_class, kill_at=batch)
    assert fit_boring_model(tmp_path / "run", loader_class) == (inputs[batch:], weights)


def train_in_child(folder: Path, *arguments: str, kill_at: float = float("inf")) -> int:
    """Train in a forked process, which kills itself before a batch or an operation on a file in `folder`.

    `kill_at` counts both, from 0. Return the exit code, which is negative for a signal.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count, start = 0, ResumeCheckpoint.on_train_batch_start

    def tick():
        nonlocal count
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    def audit(event, values):
        is_opened_to_write = event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_opened_to_write or event == "os.rename") and str(values[0]).startswith(str(folder)):
            tick()

    try:
        ResumeCheckpoint.on_train_batch_start = lambda *values: (tick(), start(*values))
        sys.addaudithook(audit)
        sys.argv = ["src/train.py", *arguments]
        train.main()
    finally:
        folder.with_suffix(".count").write_text(str(count))
        os._exit(0)


@pytest.mark.slow
def test_resume_after_sigkill_at_20_moments_gives_bitwise_identical_results(run_main, tmp_path, uninterrupted):
    folder, expected = tmp_path / "run", uninterrupted(PLAIN)
    arguments = *TINY, PLAIN, f"hydra.run.dir={folder}"
    assert train_in_child(folder, *arguments) == 0 and read_outcome(folder) == expected
    moments = int(folder.with_suffix(".count").read_text())
    for number in range(20):
        shutil.rmtree(folder)
        assert train_in_child(folder, *arguments, kill_at=number * moments // 20) == -signal.SIGKILL
        time.sleep(1)  # TensorBoard reads event files of one second in any order
        result = run_main(f"resume={folder}")
        if result.code == 2 and not (folder / "checkpoints").exists():  # killed before its config was written
            result = run_main(*arguments)
        assert result.code == 0, (number, result.err)
        assert read_outcome(folder) == expected, number
