"""How the jobs of a sweep are spread: which change together, which worker has which GPU, what a lost one costs."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf
from test_sweeps import TINY, sheet

from src import train
from src.core.config import CONF
from src.core.errors import UserError
from src.sweeps.launcher import list_gpus, planned_jobs, run_jobs


def test_keys_that_change_together_make_no_grid(run_main, tmp_path):
    lr, size = "optimizer.lr=0.1,0.2,0.3", "data.batch_size=8,16,32"
    jobs = planned_jobs([lr, "data=digits", size, "seed=0,1"], ["optimizer.lr", "data.batch_size"])
    assert len(jobs) == 6 and jobs[0] == ["optimizer.lr=0.1", "data.batch_size=8", "data=digits", "seed=0"]
    assert {(job[0], job[1]) for job in jobs} == {
        ("optimizer.lr=0.1", "data.batch_size=8"),
        ("optimizer.lr=0.2", "data.batch_size=16"),
        ("optimizer.lr=0.3", "data.batch_size=32"),
    }
    for wrong in ["optimizer.lr", "seed"], ["optimizer.lr", "model.dropout"]:
        with pytest.raises(UserError, match="as many values each"):
            planned_jobs([lr, size, "seed=0,1"], wrong)

    arguments = [*TINY, "optimizer.lr=0.1,0.2", "data.batch_size=8,16", f"hydra.sweep.dir={tmp_path / 'zipped'}"]
    together = "hydra.callbacks.sweep.zip=[optimizer.lr,data.batch_size]"
    assert run_main("-m", *arguments, together).code == 0
    rows = sheet(tmp_path / "zipped")
    assert {(row["optimizer.lr"], row["data.batch_size"]) for row in rows} == {("0.1", "8"), ("0.2", "16")}
    result = run_main("-m", *arguments, together)
    assert result.out.count("finished before") == 2 and "2 runs: 2 finished" in result.out

    result = run_main("-m", *arguments[:-1], "seed=0,1,2", "hydra.callbacks.sweep.zip=[seed,optimizer.lr]")
    assert result.code == 2 and "seed has 3, optimizer.lr has 2" in result.err.splitlines()[-1]


def test_none_begins_after_a_failure_if_so_asked(run_main, tmp_path):
    arguments = "-m", *TINY, f"hydra.sweep.dir={tmp_path}", "hydra.callbacks.sweep.fail_fast=true"
    result = run_main(*arguments, "seed=0,-1,1")
    assert result.code == 2 and "not begun, for another has failed: seed=1" in result.out
    assert "1 finished, 1 failed, 1 unfinished" in result.out
    result = run_main(*arguments, "seed=0,1")
    assert "finished before: seed=0" in result.out and "2 finished, 1 failed" in result.out


def told(number: int) -> JobReturn:
    time.sleep(0.3)  # lest one worker does all
    return JobReturn(_return_value=(number, os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()))


def killed() -> JobReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def ended() -> JobReturn:
    sys.exit(3)


def test_each_worker_has_its_gpu_and_a_killed_one_costs_its_job_alone():
    environments = [{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": name} for name in "57"]
    jobs = [partial(told, 0), killed, partial(told, 2), partial(told, 3), ended, partial(told, 5)]
    lost = []

    def name(number, why):
        lost.append((number, why))
        return JobReturn(_return_value=None)

    values = [result._return_value for result in run_jobs(jobs, environments, name)]
    done = [value for value in values if value]
    assert [value[0] for value in done] == [0, 2, 3, 5] and values[1] is values[4] is None
    assert {value[1] for value in done} == {"5", "7"}
    by_process = {value[2]: value[1] for value in done}
    assert all(by_process[value[2]] == value[1] for value in done) and os.getpid() not in by_process
    assert lost == [
        (1, "its process was killed, perhaps for lack of memory"),
        (4, "its process ended with 3"),
    ]


@pytest.mark.parametrize(
    "accelerator, visible, found",
    [("auto", "0,2,GPU-5", ["0", "2", "GPU-5"]), ("gpu", "", []), ("cpu", "0,1", [])],
)
def test_the_gpus_are_those_that_this_process_may_use(monkeypatch, accelerator, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list_gpus(OmegaConf.create({"trainer": {"accelerator": accelerator}})) == found


LOSING = "-m", *TINY[:-3], "callbacks.resume.every_steps=5", "seed=0,1,-1"


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The same jobs, one after the other in this process."""
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["src/train.py", *LOSING, f"hydra.sweep.dir={folder}"])
        train.main()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_lost_job_is_named_and_jobs_in_other_processes_give_the_same(here, run_main, tmp_path, launcher):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.split('_')[0]}_launcher")
    arguments = [*LOSING, f"hydra.sweep.dir={tmp_path}"]
    elsewhere = [f"hydra/launcher={launcher}", *["hydra.launcher.n_jobs=2"] * (launcher == "joblib")]
    sweep = subprocess.Popen(
        [sys.executable, "-m", "src.train", *arguments, *elsewhere],
        cwd=CONF.parent,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while not (tmp_path / "seed=1/checkpoints/last.ckpt").exists():
        assert sweep.poll() is None
        time.sleep(0.05)
    os.kill(worker_at(tmp_path / "seed=1"), signal.SIGKILL)
    out, err = (text.decode() for text in sweep.communicate(timeout=300))
    assert sweep.returncode == 1 and "failed: seed=1: lost: " in err and "Traceback" not in err
    assert "failed: seed=-1: seed=-1: must be" in err and "1 finished, 2 failed" in out
    result = run_main(*arguments)
    assert result.code == 2 and "2 finished, 1 failed" in result.out and result.out.count("finished before") == 1
    for job in "seed=0", "seed=1":
        one, other = (json.loads((folder / job / "metrics.json").read_text()) for folder in (here, tmp_path))
        assert one["metrics"] == other["metrics"]


def worker_at(run: Path) -> int:
    """The process that holds the lock of a run's folder."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(file.is_symlink() and file.readlink() == run / ".lock" for file in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"nobody is at work on {run}")
