"""Jobs of a multirun in one process, and runs of several processes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_with_processes

from src.core.config import CONF
from src.core.process import restore_global_state

TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "model.dropout=0.2", "optimizer.lr=0.05"),
    *("++callbacks.tensorboard=null", "trainer.max_epochs=1", "trainer.limit_train_batches=12"),
)


def final(folder: Path) -> dict:
    checkpoint = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    weights = {name: tensor.tolist() for name, tensor in checkpoint["state_dict"].items()}
    return {"weights": weights, "metrics": json.loads((folder / "metrics.json").read_text())["metrics"]}


@pytest.mark.parametrize("before", ["trainer.deterministic", "trainer.detect_anomaly", "trainer.benchmark"])
def test_job_is_bitwise_the_same_after_another_as_alone(run_main, tmp_path, before):
    assert run_main(*TINY, f"{before}=false", f"hydra.run.dir={tmp_path / 'alone'}").code == 0
    handlers, environment = list(logging.getLogger().handlers), dict(os.environ)
    assert run_main("-m", *TINY, f"{before}=true,false", f"hydra.sweep.dir={tmp_path}").code == 0
    assert final(tmp_path / f"{before}=False") == final(tmp_path / "alone")
    assert dict(os.environ) == environment
    assert len(logging.getLogger().handlers) <= max(len(handlers), 2)
    assert not torch.are_deterministic_algorithms_enabled() and not torch.is_anomaly_enabled()


def test_several_devices_in_a_multirun_are_refused(run_main, tmp_path):
    many = "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"
    result = run_main("-m", *TINY, *many, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 1 and "trainer.devices=2: a job of a sweep or study trains on one device" in result.err
    assert "Traceback" not in result.err and not list(tmp_path.rglob("*.ckpt"))


SLURM = {
    **{"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "17"},
    **{"SLURM_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"},
    **{"SLURM_NODEID": "1", "SLURM_JOB_NUM_NODES": "2"},
}


def test_processes_of_slurm_need_one_folder(run_main, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    result = run_main(*TINY)
    assert result.code == 2 and "set hydra.run.dir=" in result.err and len(result.err.splitlines()) == 1


def test_lightning_takes_its_rank_from_slurm_and_does_not_requeue(monkeypatch):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from lightning.pytorch.plugins.environments import SLURMEnvironment
    from lightning.pytorch.utilities import rank_zero_only

    from src.training.resume import ResumeCheckpoint

    monkeypatch.setattr(rank_zero_only, "rank", 0)  # Lightning sets it to 3, and would not log in the tests after
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        overrides = ["trainer=ddp", "trainer.devices=2", "trainer.num_nodes=2", "trainer.accelerator=cpu"]
        config = compose("train", overrides=[*overrides, "output_dir=nowhere"])
    with restore_global_state():  # Lightning notes the first node's name in the environment
        trainer = instantiate(config.trainer, logger=False)
        environment = trainer.strategy.cluster_environment
        assert isinstance(environment, SLURMEnvironment) and environment.creates_processes_externally
        assert environment.main_address == "node1"
        assert (trainer.world_size, trainer.global_rank, trainer.local_rank, trainer.node_rank) == (4, 3, 1, 1)
        ResumeCheckpoint("nowhere").on_fit_start(trainer, None)
        assert not environment.auto_requeue


@pytest.mark.slow
def test_run_of_three_processes_continues_bitwise_after_one_is_killed(tmp_path):  # a sum of two has one order
    many = "trainer=ddp", "trainer.devices=3", "trainer.accelerator=cpu", "data.batch_size=11", "trainer.max_epochs=2"
    command = [sys.executable, "-m", "src.train"]
    arguments = [*TINY[:-2], *many, "callbacks.resume.every_steps=20"]
    settings = {"cwd": CONF.parent, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stderr": subprocess.PIPE}
    limit = {"check": True, "timeout": 300}
    whole, folder = tmp_path / "whole", tmp_path / "run"
    run_with_processes(3, *arguments, f"hydra.run.dir={whole}")
    first = subprocess.Popen([*command, *arguments, f"hydra.run.dir={folder}"], **settings)
    while first.poll() is None and not (folder / "checkpoints/last.ckpt").exists():
        time.sleep(0.05)
    second, _ = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(second), signal.SIGKILL)
    first.communicate(timeout=60)  # it finds the connection closed, or Lightning's observer of the processes kills it
    assert first.returncode in (-signal.SIGKILL, 1)
    assert [file.name for file in tmp_path.iterdir() if file.is_dir()] in (["whole", "run"], ["run", "whole"])
    subprocess.run([*command, f"resume={folder}"], **limit, **settings)
    assert final(folder) == final(whole)
