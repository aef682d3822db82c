"""Optuna studies: target, pruning, mistakes, several processes, interrupted trials."""

import json
import multiprocessing
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from test_sweeps import TINY, read_csv, read_scores

from src import tune
from src.core.config import CONF
from src.core.value_types import RULES

optuna = pytest.importorskip("optuna")

from src.sweeps.optuna_study import COUNTED, open_study, optimize  # noqa: E402

PG_CTL = sorted(Path("/usr/lib/postgresql").glob("*/bin/pg_ctl"))
CFG = {
    **{"name": "study", "study_name": "shared", "n_trials": 24, "heartbeat": 1, "seed": 0},
    **{"optimized_metric": "val/acc", "optimized_mode": "max", "search": {}},
    "sampler": {"_target_": "optuna.samplers.RandomSampler"},
    "pruner": {"_target_": "optuna.pruners.NopPruner"},
}


def load_trials(folder: Path) -> list:
    return optuna.load_study(study_name=None, storage=f"sqlite:///{folder}/study.db").trials


def test_study_reaches_its_target_prunes_and_refuses_other_settings(run_main, tmp_path):
    arguments = [*TINY, "trainer.max_epochs=2", "data.batch_size=16", "pruner.n_startup_trials=2"]
    arguments += ["pruner.n_warmup_steps=0", "search.optimizer.lr.low=0.0001", f"hydra.run.dir={tmp_path}"]
    for target in 3, 6, 6:
        result = run_main(*arguments, f"n_trials={target}", main=tune.main)
        assert result.code == 0 and len(load_trials(tmp_path)) == target, result.err
    states = [trial.state.name for trial in load_trials(tmp_path)]
    counts = f"6 runs: {states.count('COMPLETE')} finished, {states.count('PRUNED')} pruned"
    assert "6 of 6 trials are done" in result.out and counts in result.out and set(states) == {"COMPLETE", "PRUNED"}
    assert len({str(trial.params) for trial in load_trials(tmp_path)}) == 6
    scores = [float(row["val/acc"]) for row in read_csv(tmp_path) if row["state"] == "finished"]
    values = [trial.value for trial in load_trials(tmp_path) if trial.state.name == "COMPLETE"]
    assert sorted(scores) == pytest.approx(sorted(values))
    result = run_main(*arguments, "n_trials=7", "search.optimizer.lr.high=0.5", main=tune.main)
    assert result.code == 2 and "its study was begun with" in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("optimized_metric=test/acc", "other than test"),
        ("search.optimizer.lr.suggest=flaot", "with suggest: float, int or categorical"),
        ("search.optimizer.lr.low=5", "search.optimizer.lr"),
        ("trial=5", "did you mean n_trials?"),
        ("n_trials=0", "must be int ≥ 1"),
        ("search.optimizer=3", "type a range as in conf/search/"),
        ("storage='postgresql+psycopg://nobody@/none?host=/nowhere'", "storage"),
        ("storage='postgresql+nodriver://x/y'", "storage"),
        (f"storage={CONF / 'tune.yaml'}", "storage: Could not parse"),
        ("pruner.foo=1", "pruner.foo: no such key"),
        ("search={seed: {suggest: int, low: 0, high: 1}}", "type ~search '+search={…}'"),
    ],
)
def test_mistake_in_a_study_prints_one_line(run_main, tmp_path, mistake, words):
    result = run_main(*TINY, "n_trials=1", mistake, f"hydra.run.dir={tmp_path}", main=tune.main)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_mistake_in_a_later_trial_keeps_the_trials_before(run_main, tmp_path):
    study, space = tmp_path / "study", ["search.optimizer.lr.log=false", "search.optimizer.lr.low=-0.5"]
    result = run_main(*TINY, *space, "n_trials=10", "seed=1", f"hydra.run.dir={study}", main=tune.main)
    assert result.code == 2 and "must be float > 0" in result.err and "trial 1: optimizer.lr=-" in result.out
    assert len(load_trials(study)) == 2 and len(list(study.glob("*/metrics.json"))) == 1


def test_study_takes_new_keys_lists_and_null_and_continues_where_it_was_moved(run_main, tmp_path):
    choices = "betas: {suggest: categorical, choices: [[0.9,0.99],[0.8,0.9]]}"
    arguments = [*TINY[:2], *TINY[3:], "optimizer=adamw", "sampler.seed=3"]
    arguments += ["~search", f"+search={{optimizer: {{{choices}}}}}"]
    arguments += ["+search.trainer.gradient_clip_val={suggest: categorical, choices: [null]}"]
    arguments += ['+search.data.augment={suggest: categorical, choices: ["{degrees: 5.0, scale: 0}"]}']
    arguments += ["~pruner", "+pruner={_target_: optuna.pruners.HyperbandPruner, max_resource: 3}"]
    result = run_main(*arguments, "n_trials=2", f"hydra.run.dir={tmp_path / 'here'}", main=tune.main)
    assert result.code == 0, result.err
    (tmp_path / "here").rename(tmp_path / "there")
    result = run_main(*arguments, "n_trials=4", f"hydra.run.dir={tmp_path / 'there'}", main=tune.main)
    assert result.code == 0 and "2 of 4 trials are done" in result.out, result.err
    trials = load_trials(tmp_path / "there")
    assert {trial.params["optimizer.betas"] for trial in trials} <= {"[0.9, 0.99]", "[0.8, 0.9]"} and len(trials) == 4
    rows = read_csv(tmp_path / "there")
    assert len(rows) == 4 and "Left out: 2" in result.out  # trials of the same choices are no seeds
    assert all(f"optimizer.betas={row['optimizer.betas']}" in row["overrides"] for row in rows)
    command = next(line for line in result.out.splitlines() if "python -m src.train" in line)
    assert run_main(*shlex.split(command)[3:], f"hydra.run.dir={tmp_path / 'again'}").code == 0
    assert read_scores(tmp_path / "again")["val/loss"] == float(rows[0]["val/loss"])


def test_study_ends_if_no_score_is_a_number(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "train", lambda *_: float("nan"))
    result = run_main(*TINY, "n_trials=2", f"hydra.run.dir={tmp_path}", main=tune.main)
    assert result.code == 0 and [trial.state.name for trial in load_trials(tmp_path)] == ["PRUNED"] * 2


def test_diverged_trial_counts_as_pruned(run_main, tmp_path):
    arguments = [*TINY, "search.optimizer.lr.low=1e30", "search.optimizer.lr.high=1e31", "scheduler=none"]
    result = run_main(*arguments, "n_trials=1", f"hydra.run.dir={tmp_path}", main=tune.main)
    assert result.code == 0 and "1 runs: 1 pruned" in result.out, result.err
    assert [trial.state.name for trial in load_trials(tmp_path)] == ["PRUNED"]


@pytest.fixture
def postgres():
    """Return the URL of a PostgreSQL server for one test."""
    pytest.importorskip("psycopg")
    if not PG_CTL or not shutil.which("runuser") or os.geteuid() != 0:
        pytest.skip("PostgreSQL's server is not installed, or may not be started by this user")
    folder = Path(tempfile.mkdtemp(prefix="postgres"))
    shutil.chown(folder, "postgres")
    command = ["runuser", "-u", "postgres", "--", PG_CTL[-1], "-s", "-D", folder / "data"]
    subprocess.run([*command, "initdb", "-o", "--auth=trust --no-sync"], check=True, cwd="/", stdout=subprocess.DEVNULL)
    options = f"-k {folder} -c listen_addresses= -c fsync=off"
    subprocess.run([*command, "-w", "-l", folder / "log", "-o", options, "start"], check=True, cwd="/")
    yield f"postgresql+psycopg://postgres@/postgres?host={folder}"
    subprocess.run([*command, "-m", "immediate", "stop"], check=True, cwd="/")
    shutil.rmtree(folder)


def work_on_study(cfg: dict, folder: Path, hangs: bool) -> None:
    def objective(trial):
        if hangs:
            (folder / "hanging").write_text(str(trial.number))
            time.sleep(100)
        time.sleep(0.4)
        return trial.suggest_float("x", 0, 1)

    optimize(open_study(OmegaConf.create(cfg), folder), objective, cfg["n_trials"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_four_workers_share_a_study_and_retry_a_killed_trial(kind, tmp_path, request):
    storage = request.getfixturevalue(kind) if kind == "postgres" else None
    cfg, context = CFG | {"storage": storage}, multiprocessing.get_context("fork")
    workers = [context.Process(target=work_on_study, args=(cfg, tmp_path, number == 0)) for number in range(4)]
    workers[0].start()
    while not (tmp_path / "hanging").exists() or not (tmp_path / "hanging").read_text():
        assert workers[0].is_alive()
        time.sleep(0.05)
    for worker in workers[1:]:
        worker.start()
    time.sleep(0.5)
    workers[0].kill()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [-signal.SIGKILL, 0, 0, 0]
    trials = optuna.load_study(study_name="shared", storage=storage or f"sqlite:///{tmp_path}/study.db").trials
    values = [trial.value for trial in trials if trial.state in COUNTED]
    assert 24 <= len(values) <= 26 and len(set(values)) == len(values)  # one more per further worker at the end
    killed = int((tmp_path / "hanging").read_text())
    (retry,) = [trial for trial in trials if trial.system_attrs.get("failed_trial") == killed]
    assert trials[killed].state.name == "FAIL" and retry.state.name == "COMPLETE"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_interrupted_trial_continues_from_its_checkpoint_bitwise(run_main, tmp_path, number):
    training = [*TINY, "trainer.limit_train_batches=150", "callbacks.resume.every_steps=10"]
    study = ["~search.optimizer", "heartbeat=1", "n_trials=2", f"hydra.run.dir={tmp_path / 'study'}"]
    command = [sys.executable, "-m", "src.tune", *training, *study]
    process = subprocess.Popen(command, cwd=CONF.parent, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("study/000_*/checkpoints/last.ckpt")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
    time.sleep(3)  # two heartbeats
    printed = shlex.split(process.stderr.read().partition("continue with: python -m src.tune ")[2])
    assert bool(printed) == (number == signal.SIGTERM)
    result = run_main(*(printed or command[3:]), main=tune.main)
    assert result.code == 0 and "0 of 2 trials are done" in result.out and "2 runs: 2 finished" in result.out
    (folder,) = tmp_path.glob("study/000_*")
    dropout = folder.name.partition("_")[2]
    assert run_main(*training, dropout, f"hydra.run.dir={tmp_path / 'whole'}").code == 0
    assert read_scores(folder) == read_scores(tmp_path / "whole")
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_study_has_rules_for_its_keys_and_help(run_main):
    assert "n_trials: 20" in run_main("--help", main=tune.main).out
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert {key.partition(".")[0] for key in RULES} <= compose("tune").keys()


def test_study_on_several_devices_is_refused(run_main, tmp_path):
    several = "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"
    result = run_main(*TINY, *several, f"hydra.run.dir={tmp_path / 'study'}", main=tune.main)
    assert result.code == 2 and "a job of a sweep or study trains on one device" in result.err.splitlines()[-1]
