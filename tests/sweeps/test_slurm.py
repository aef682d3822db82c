"""On a Slurm of two nodes: sweeps that lose a node, runs of several nodes that are stopped, jobs whose time is up."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import run_with_processes
from slurm import Cluster, cluster, lacking
from test_sweeps import TINY, read_weights

from src.core.config import CONF

pytestmark = [pytest.mark.slurm, pytest.mark.slow]
LONG = [*TINY[:-3], "optimizer.lr=0.1", "callbacks.model_summary=null", "callbacks.resume.every_steps=10"]
PROGRAM = [sys.executable, "-m", "src.train"]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if reason := lacking():
        pytest.skip(f"no Slurm: {reason}")
    with cluster(tmp_path_factory.mktemp("slurm")) as up:
        yield up


def wait_for(condition, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def sweep(slurm: Cluster, folder: Path, *arguments: str) -> subprocess.Popen:
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.partition=main", "hydra.launcher.timeout_min=10"]
    command = [*PROGRAM, "-m", *LONG, *launcher, f"hydra.sweep.dir={folder}", *arguments]
    return subprocess.Popen(
        command, cwd=CONF.parent, env=slurm.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_sweep_continues_bitwise_after_a_node_was_lost(run_main, slurm, tmp_path):
    steps = "trainer.limit_train_batches=60"
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    running = sweep(slurm, cut, steps, "seed=range(6)")
    wait_for(lambda: len(list(cut.glob("*/metrics.json"))) >= 1)
    slurm.kill("n2")
    time.sleep(1)
    slurm.start("n2")
    out, err = running.communicate(timeout=400)
    before = {file: file.stat().st_mtime_ns for file in cut.glob("*/metrics.json")}
    if running.returncode:  # what Slurm did not begin again by itself
        assert "Traceback" not in err
        out, err = sweep(slurm, cut, steps, "seed=range(6)").communicate(timeout=400)
    assert "6 runs: 6 finished" in out, err
    assert before.items() <= {file: file.stat().st_mtime_ns for file in cut.glob("*/metrics.json")}.items()
    assert run_main("-m", *LONG, steps, "seed=range(6)", f"hydra.sweep.dir={whole}").code == 0
    assert all(read_weights(cut / f"seed={seed}") == read_weights(whole / f"seed={seed}") for seed in range(6))


def test_cancelled_job_is_reported_and_the_others_finish(slurm, tmp_path):
    running = sweep(slurm, tmp_path, "trainer.limit_train_batches=100", "seed=0,1,2")
    wait_for(lambda: (tmp_path / "seed=1/checkpoints/last.ckpt").exists())
    (job,) = [file.name.partition("_0_")[0] for file in (tmp_path / ".submitit").glob("*_1/*_0_log.err")]
    slurm.ask("scancel", "--signal=KILL", job)  # Slurm sends SIGTERM first
    out, err = running.communicate(timeout=400)
    assert running.returncode == 1 and "2 finished, 1 unfinished" in out and "seed=1: unfinished" in out, err


def test_job_at_its_time_limit_is_requeued_and_continues_bitwise(run_main, slurm, tmp_path):
    steps, twice = "trainer.limit_train_batches=150", "hydra.launcher.max_num_timeout=3"
    running = sweep(slurm, tmp_path / "cut", steps, twice, "seed=0,1")
    last = tmp_path / "cut/seed=1/checkpoints/last.ckpt"
    wait_for(last.exists)
    (log,) = (tmp_path / "cut/.submitit").glob("*_1/*_0_log.err")
    slurm.ask("scancel", "--signal=USR2", log.name.partition("_0_")[0])
    out, err = running.communicate(timeout=400)
    assert "2 runs: 2 finished" in out, err
    assert "Caught signal SIGUSR2" in log.read_text() and "DUE TO JOB REQUEUE" in log.read_text()
    assert run_main(*LONG, steps, "seed=1", f"hydra.run.dir={tmp_path / 'whole'}").code == 0
    assert read_weights(tmp_path / "cut/seed=1") == read_weights(tmp_path / "whole")


def test_batch_script_is_requeued_and_continues_bitwise(slurm, tmp_path):
    text = (CONF.parent / "docs/sweeps.md").read_text()
    script = text[text.index("#!/bin/bash") :].partition("```")[0]
    many = ["trainer.accelerator=cpu", "data.batch_size=16", "trainer.max_epochs=2", *LONG[:3], *LONG[4:]]
    script = script.replace("hydra.run.dir=$RUN", f"hydra.run.dir=$RUN {' '.join(many)}")
    script = script.replace("outputs/mnist", str(tmp_path)).replace("python", sys.executable)
    (tmp_path / "job.sh").write_text(script)

    words = slurm.ask("sbatch", f"--chdir={CONF.parent}", f"--output={tmp_path}/%j.txt", str(tmp_path / "job.sh"))
    cut = words.split()[-1]
    wait_for(lambda: (tmp_path / f"slurm-{cut}/checkpoints/last.ckpt").exists())
    slurm.ask("scancel", "--signal=TERM", cut)
    slurm.wait(cut, "PENDING", "COMPLETED", seconds=60)
    assert slurm.wait(cut, "COMPLETED", "FAILED", seconds=300) == "COMPLETED"
    log = (tmp_path / f"{cut}.txt").read_text()
    assert log.count("stopped by SIGTERM; continue with") == 1
    run_with_processes(4, *many, f"hydra.run.dir={tmp_path / 'whole'}")
    assert read_weights(tmp_path / f"slurm-{cut}") == read_weights(tmp_path / "whole")
