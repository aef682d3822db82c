"""A study shared by several processes, whose interrupted trials continue."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from test_sweeps import TINY, sheet

from src import tune
from src.core.config import CONF

optuna = pytest.importorskip("optuna")

from optuna.storages import RetryHeartbeatStaleTrialCallback as Retry  # noqa: E402

from src.sweeps.optuna_study import COUNTED, open_storage, open_study, optimize  # noqa: E402

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
CFG = {
    **{
        "name": "study",
        "study_name": "shared",
        "n_trials": 24,
        "heartbeat": 1,
        "seed": 0,
        "optimized_metric": "val/acc",
    },
    **{"optimized_mode": "max", "sampler": {"_target_": "optuna.samplers.RandomSampler"}},
    "pruner": {"_target_": "optuna.pruners.NopPruner"},
}


@pytest.fixture
def postgres():
    """Return the URL of a PostgreSQL server for one test."""
    pytest.importorskip("psycopg")
    if not PROGRAMS or not shutil.which("runuser") or os.geteuid() != 0:
        pytest.skip("PostgreSQL's server is not installed, or may not be started by this user")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    shutil.chown(folder, "postgres")
    do = ["runuser", "-u", "postgres", "--", PROGRAMS[-1], "-s", "-D", folder / "data"]
    subprocess.run([*do, "initdb", "-o", "--auth=trust --no-sync"], check=True, cwd="/", stdout=subprocess.DEVNULL)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    subprocess.run([*do, "-w", "-l", folder / "log", "-o", options, "start"], check=True, cwd="/")
    try:
        yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    finally:
        subprocess.run([*do, "-m", "immediate", "stop"], check=True, cwd="/")
        shutil.rmtree(folder)


def work(cfg: dict, folder: Path, target: int, hang: bool) -> None:
    def objective(trial):
        if hang:
            (folder / "hangs").write_text(str(trial.number))
            time.sleep(100)
        x = trial.suggest_float("x", 0, 1)
        time.sleep(0.4)
        return x

    study = open_study(OmegaConf.create(cfg), folder)
    optimize(study, objective, target, update=lambda: None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "journal", "postgres"])
def test_four_workers_share_a_study_and_retry_a_killed_trial(kind, tmp_path, request):
    place = {"sqlite": None, "journal": str(tmp_path / "study.log")}
    storage = place[kind] if kind in place else request.getfixturevalue(kind)
    cfg, context = CFG | {"storage": storage}, multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(cfg, tmp_path, 24, number == 0)) for number in range(4)]
    workers[0].start()
    while not (tmp_path / "hangs").exists() or not (tmp_path / "hangs").read_text():
        assert workers[0].is_alive()
        time.sleep(0.05)
    for worker in workers[1:]:
        worker.start()
    time.sleep(0.5)
    workers[0].kill()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    trials = optuna.load_study(study_name="shared", storage=open_storage(storage, 1, tmp_path)).trials
    assert 24 <= sum(trial.state in COUNTED for trial in trials) <= 26  # one more per worker that was in its last trial
    killed = int((tmp_path / "hangs").read_text())
    if kind != "journal":  # which has no heartbeat
        assert trials[killed].state.name == "FAIL"
        (retry,) = [trial for trial in trials if Retry.retried_trial_number(trial) == killed]
        assert retry.state.name == "COMPLETE"
    values = Counter(trial.value for trial in trials if trial.state in COUNTED)
    assert set(values.values()) == {1}  # no two workers draw the same


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_trial_continues_from_its_checkpoint(run_main, tmp_path, how):
    place = f"hydra.run.dir={tmp_path / 'study'}"
    arguments = [
        *TINY[:-3],
        "trainer.limit_train_batches=150",
        "callbacks.resume.every_steps=10",
        "callbacks.model_summary=null",
    ]
    arguments += ["~search.optimizer", "optimizer.lr=0.1", "heartbeat=1", place]
    command = [sys.executable, "-m", "src.tune", *arguments, "n_trials=2"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, cwd=CONF.parent, **quiet)
    while not list(tmp_path.glob("study/000_*/checkpoints/last.ckpt")):
        assert first.poll() is None
        time.sleep(0.05)
    first.send_signal(how)
    assert first.wait(60) == (-how if how == signal.SIGKILL else 128 + how)
    if how == signal.SIGKILL:
        time.sleep(3)  # two heartbeats
    result = run_main(*arguments, "n_trials=2", main=tune.main)
    assert result.code == 0 and "0 of 2 trials are done" in result.out, result.err
    (folder,) = tmp_path.glob("study/000_*")
    assert "2 runs: 2 finished" in result.out and len(sheet(tmp_path / "study")) == 2
    # As it would have been: the same settings in one go.
    dropout = folder.name.partition("_")[2]
    whole = tmp_path / "whole"
    train_arguments = [item for item in arguments if not item.startswith(("~search", "heartbeat", "storage", "hydra"))]
    assert run_main(*train_arguments, dropout, f"hydra.run.dir={whole}").code == 0
    first, second = (json.loads((place / "metrics.json").read_text())["metrics"] for place in (folder, whole))
    assert first == second


def test_missing_database_prints_one_line(run_main, tmp_path):
    for storage in "postgresql+psycopg://nobody@/none?host=/nowhere", "postgresql+nodriver://x/y":
        result = run_main("n_trials=1", f"storage='{storage}'", f"hydra.run.dir={tmp_path}", main=tune.main)
        assert result.code == 2 and result.err.startswith("error: storage=") and len(result.err.splitlines()) == 1
