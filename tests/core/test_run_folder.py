import json
import os
import shutil
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL
from omegaconf import OmegaConf

from src.core.errors import DivergenceError, UserError
from src.core.process import configure_hardware, count_cores
from src.core.run_folder import read_status, record_status, remove_if_untrained
from src.training.console import LayerTable


def test_finished_run_has_status_and_resolved_portable_config(finished_run):
    assert read_status(finished_run) == {"state": "finished", "message": "", "traceback": ""}
    text = (finished_run / ".hydra/config.yaml").read_text()
    assert str(finished_run) not in text and "dirpath: ${output_dir}/checkpoints" in text
    assert json.loads((finished_run / "metrics.json").read_text())["threads"] == 1


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (UserError("a mistake"), "failed"),
        (DivergenceError("the loss is nan"), "failed"),
        (ZeroDivisionError("a bug"), "failed"),
        (SystemExit(143), "interrupted"),
    ],
)
def test_status_records_how_a_run_ended(tmp_path, error, state):
    with pytest.raises(type(error)), record_status(tmp_path):
        assert read_status(tmp_path)["state"] == "running"
        raise error
    status = read_status(tmp_path)
    assert status["state"] == state
    assert ("ZeroDivisionError" in status["traceback"]) == isinstance(error, ZeroDivisionError)


@pytest.mark.parametrize("is_finished", [True, False])
def test_folder_of_a_run_is_not_used_again(run_main, finished_run, tmp_path, is_finished):
    folder = shutil.copytree(finished_run, tmp_path / "small_s0")
    if not is_finished:
        (folder / "metrics.json").unlink()
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    result = run_main(*SMALL, "name=small", f"hydra.run.dir={tmp_path}/${{name}}_s${{seed}}")
    assert result.code == 2 and f"resume={folder}" in result.err and len(result.err.splitlines()) == 1
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize("mark", ["multirun.yaml", ".tune/config.yaml"])
def test_folder_is_used_by_one_kind_of_program(run_main, tmp_path, mark):
    (tmp_path / mark).parent.mkdir(exist_ok=True)
    (tmp_path / mark).write_text("seed: 0")
    result = run_main(*SMALL, f"hydra.run.dir={tmp_path}")
    assert result.code == 2 and ": holds a " in result.err and len(result.err.splitlines()) == 1


@pytest.mark.parametrize("files", [{"config": "trainer: {max_ep"}, {"config": "seed: 0"}, {"config": "", "hydra": ""}])
def test_files_of_hydra_that_were_cut_short_do_not_block_a_new_run(run_main, tmp_path, files):
    (tmp_path / ".hydra").mkdir()
    for name, text in files.items():
        (tmp_path / f".hydra/{name}.yaml").write_text(text)
    result = run_main(f"resume={tmp_path}")
    assert result.code == 2 and "type its first command again" in result.err
    result = run_main(*SMALL, f"hydra.run.dir={tmp_path}")
    assert result.code == 0, result.err


def test_failed_start_keeps_a_folder_that_others_use(run_main, tmp_path, monkeypatch):
    wrong = *SMALL, "optimized_metric=val/nope"
    assert run_main(*wrong, f"hydra.run.dir={tmp_path}").code == 2 and (tmp_path / "status.json").exists()
    monkeypatch.setattr(LayerTable, "on_train_start", lambda *_: (tmp_path / "run/note.txt").write_text("mine"))
    assert run_main(*wrong, f"hydra.run.dir={tmp_path / 'run'}").code == 2
    assert (tmp_path / "run/note.txt").read_text() == "mine"


def test_run_that_fails_after_its_first_minute_keeps_its_folder(run_main, monkeypatch, tmp_path):
    monkeypatch.setattr("src.cli.hydra_main.time", SimpleNamespace(monotonic=count(0, 60).__next__))
    result = run_main(*SMALL, "optimized_metric=val/nope", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and read_status(tmp_path / "run")["state"] == "failed"


def test_folder_with_a_checkpoint_is_never_removed(tmp_path):
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    (tmp_path / "run/checkpoints/last.ckpt").touch()
    remove_if_untrained(tmp_path / "run")
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()


@pytest.fixture
def unfinished_run(finished_run, tmp_path) -> Path:
    folder = shutil.copytree(finished_run, tmp_path / "unfinished")
    (folder / "metrics.json").unlink()
    return folder


def test_resume_takes_todays_defaults_for_missing_keys(run_main, unfinished_run):
    file = unfinished_run / ".hydra/config.yaml"
    config = OmegaConf.load(file)
    for node, key in (config, "threads"), (config, "init_from"), (config.data, "fold"):
        del node[key]
    OmegaConf.save(config, file)
    result = run_main(f"resume={unfinished_run}")
    assert result.code == 0, result.err
    assert "lacks threads, init_from; today's defaults are used" in result.err
    assert (unfinished_run / "metrics.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["seed=3"], "leave out seed=3, or type init_from="),
        (["callbacks.best.patience=3"], "callbacks.best.patience: no such key"),
        (["+trainer.max_epochs=3"], "Either remove + prefix"),
        (["trainer.max_epochs=3,4"], "Ambiguous value"),
        (["-m"], "leave out -m"),
    ],
)
def test_resume_refuses_other_settings(run_main, unfinished_run, arguments, words):
    result = run_main(f"resume={unfinished_run}", *arguments)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_cpu_quota_of_the_cgroup_counts_as_cores(monkeypatch, tmp_path):
    monkeypatch.setattr("src.core.process.CPU_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text("max 100000")
    assert count_cores() == len(os.sched_getaffinity(0))
    (tmp_path / "cpu.max").write_text("50000 100000")
    assert count_cores() == 1


def test_saved_config_must_not_use_resolvers(run_main, unfinished_run):
    file = unfinished_run / ".hydra/config.yaml"
    file.write_text(file.read_text().replace("name: small", "name: ${oc.env:HOME}"))
    result = run_main(f"resume={unfinished_run}")
    assert result.code == 2 and "${oc.env:HOME}" in result.err and len(result.err.splitlines()) == 1


def test_threads_default_to_the_cores_and_are_kept_in_the_config(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    try:
        for given, expected in (None, count_cores()), (3, 3):
            config = OmegaConf.create({"threads": given})
            configure_hardware(config)
            assert config.threads == torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
