"""How the jobs of a sweep are spread: which worker has which GPU, what a lost one costs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from test_sweeps import TINY, read_scores

from src.core.config import CONF
from src.core.process import count_gpus, pin_gpu
from src.sweeps.callback import SweepCallback


def test_config_without_gpus_counts_none(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for accelerator, count in ("auto", 2), ("gpu", 2), ("cpu", 0):
        assert count_gpus(OmegaConf.create({"trainer": {"accelerator": accelerator}})) == count


def test_parallel_jobs_get_one_gpu_by_their_number(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    overrides = ["trainer.accelerator=gpu", "hydra/launcher=joblib", f"hydra.sweep.dir={tmp_path}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides=overrides, return_hydra_config=True)
    with open_dict(config):
        config.hydra.overrides.task = ["seed=range(16)"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            SweepCallback().on_multirun_start(config)
    assert config.hydra.launcher.n_jobs == 3
    config.hydra.job.num = 4
    monkeypatch.setattr("hydra.core.hydra_config.HydraConfig.get", lambda: config.hydra)
    pin_gpu(config)
    assert config.trainer.devices == [1]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_lost_worker_is_reported_and_the_sweep_continues_bitwise(run_main, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    settings = [*TINY, "trainer.limit_train_batches=100", "callbacks.resume.every_steps=5"]
    arguments = ["-m", *settings, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]
    parallel = [f"hydra/launcher={launcher}", *["hydra.launcher.n_jobs=2"] * (launcher == "joblib")]
    command = [sys.executable, "-m", "src.train", *arguments, *parallel]
    sweep = subprocess.Popen(command, cwd=CONF.parent, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "seed=1/checkpoints/last.ckpt").exists():
        assert sweep.poll() is None
        time.sleep(0.05)
    os.kill(find_worker(tmp_path / "seed=1"), signal.SIGKILL)
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1 and "seed=1: unfinished" in out and "Traceback" not in err
    assert f"hydra.sweep.dir={tmp_path}" in out.partition("continue with")[2]
    result = run_main(*arguments)
    assert result.code == 0 and "2 runs: 2 finished" in result.out
    assert run_main("-m", *settings, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'whole'}").code == 0
    for job in "seed=0", "seed=1":
        assert read_scores(tmp_path / job) == read_scores(tmp_path / "whole" / job)


def find_worker(run: Path) -> int:
    """Return the process that holds the lock on a run folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(file.is_symlink() and file.readlink() == run / ".lock" for file in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"no process uses {run}")
