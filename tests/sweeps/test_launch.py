"""How the jobs of a sweep are spread: which change together, which worker has which GPU, what a lost one costs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_sweeps import TINY, sheet

from src import train
from src.core.config import CONF
from src.core.errors import UserError
from src.core.process import list_gpus, pin_gpu
from src.sweeps.callback import _divide_machine
from src.sweeps.grid import list_jobs


def test_zipped_keys_change_together(run_main, tmp_path):
    lr, size = "optimizer.lr=0.1,0.2,0.3", "data.batch_size=8,16,32"
    jobs = list_jobs([lr, "data=digits", size, "seed=0,1"], ["optimizer.lr", "data.batch_size"])
    assert len(jobs) == 6 and jobs[0] == ["optimizer.lr=0.1", "data.batch_size=8", "data=digits", "seed=0"]
    assert {(job[0], job[1]) for job in jobs} == {
        ("optimizer.lr=0.1", "data.batch_size=8"),
        ("optimizer.lr=0.2", "data.batch_size=16"),
        ("optimizer.lr=0.3", "data.batch_size=32"),
    }
    for wrong in ["optimizer.lr", "seed"], ["optimizer.lr", "model.dropout"]:
        with pytest.raises(UserError, match="need the same number of values"):
            list_jobs([lr, size, "seed=0,1"], wrong)

    arguments = [*TINY, "optimizer.lr=0.1,0.2", "data.batch_size=8,16", f"hydra.sweep.dir={tmp_path / 'zipped'}"]
    together = "hydra.callbacks.sweep.zip=[optimizer.lr,data.batch_size]"
    assert run_main("-m", *arguments, together).code == 0
    rows = sheet(tmp_path / "zipped")
    assert {(row["optimizer.lr"], row["data.batch_size"]) for row in rows} == {("0.1", "8"), ("0.2", "16")}
    result = run_main("-m", *arguments, together)
    assert result.out.count("already finished") == 2 and "2 runs: 2 finished" in result.out

    result = run_main("-m", *arguments[:-1], "seed=0,1,2", "hydra.callbacks.sweep.zip=[seed,optimizer.lr]")
    assert result.code == 2 and "seed has 3, optimizer.lr has 2" in result.err.splitlines()[-1]


def test_fail_fast_starts_no_job_after_a_failure(run_main, tmp_path):
    arguments = "-m", *TINY, f"hydra.sweep.dir={tmp_path}", "hydra.callbacks.sweep.fail_fast=true"
    result = run_main(*arguments, "seed=0,-1,1")
    assert result.code == 2 and "not started, because another job has failed: seed=1" in result.out
    assert "1 finished, 1 failed, 1 unfinished" in result.out
    result = run_main(*arguments, "seed=0,1")
    assert "already finished: seed=0" in result.out and "2 finished, 1 failed" in result.out


@pytest.mark.parametrize(
    "accelerator, visible, found",
    [("auto", "0,2,GPU-5", ["0", "2", "GPU-5"]), ("gpu", "", []), ("cpu", "0,1", [])],
)
def test_gpus_are_those_visible_to_this_process(monkeypatch, accelerator, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list_gpus(OmegaConf.create({"trainer": {"accelerator": accelerator}})) == found


def test_parallel_jobs_share_gpus_and_cores(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,GPU-5")
    monkeypatch.setattr("src.sweeps.callback.count_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS")
    launcher = {"_target_": "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "n_jobs": -1}
    config = OmegaConf.create({"threads": None, "trainer": {"accelerator": "gpu", "devices": 1}})
    config.hydra = {"launcher": launcher, "job": {"env_set": {}, "num": 4}}
    _divide_machine(config, jobs=16)
    assert config.hydra.launcher.n_jobs == 3 and config.hydra.job.env_set.OMP_NUM_THREADS == "2"
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: config.hydra)
    pin_gpu(config)
    assert config.trainer.devices == [1]


LOSING = "-m", *TINY[:-3], "callbacks.resume.every_steps=5", "seed=0,1,-1"


@pytest.fixture(scope="module")
def sequential(tmp_path_factory) -> Path:
    """The same jobs, one after the other in this process."""
    folder = tmp_path_factory.mktemp("sequential")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["src/train.py", *LOSING, f"hydra.sweep.dir={folder}"])
        train.main()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_lost_worker_is_reported_and_the_sweep_continues_bitwise(sequential, run_main, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    arguments = [*LOSING, f"hydra.sweep.dir={tmp_path}"]
    parallel = [f"hydra/launcher={launcher}", *["hydra.launcher.n_jobs=2"] * (launcher == "joblib")]
    command = [sys.executable, "-m", "src.train", *arguments, *parallel]
    sweep = subprocess.Popen(command, cwd=CONF.parent, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "seed=1/checkpoints/last.ckpt").exists():
        assert sweep.poll() is None
        time.sleep(0.05)
    os.kill(find_worker(tmp_path / "seed=1"), signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1 and "seed=1: its process has died" in out and "Traceback" not in err
    assert f"hydra.sweep.dir={tmp_path}" in out
    result = run_main(*arguments)
    assert result.code == 2 and "2 finished, 1 failed" in result.out
    for job in "seed=0", "seed=1":
        first, second = (json.loads((folder / job / "metrics.json").read_text()) for folder in (sequential, tmp_path))
        assert first["metrics"] == second["metrics"]


def find_worker(run: Path) -> int:
    """Return the process that holds the lock on a run folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(file.is_symlink() and file.readlink() == run for file in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process uses {run}")
