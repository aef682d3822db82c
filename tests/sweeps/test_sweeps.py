"""Sweeps: their report, their failures, and how they continue."""

import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import yaml
from conftest import SMALL
from hydra import initialize_config_dir
from matplotlib import image
from omegaconf import OmegaConf

from src import report
from src.core.config import CONF, infer_mode
from src.core.files import exclusive_lock
from src.core.run_folder import read_status, write_status
from src.sweeps.callback import list_jobs
from src.sweeps.plots import plot_heat_map, plot_scores
from src.sweeps.report import format_report, write_report
from src.sweeps.runs import Comparison, compare_runs, format_train_command, read_runs
from src.sweeps.stats import LEVEL, corrected_p_values

TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "optimizer.lr=0.1", "++callbacks.tensorboard=null"),
    *("callbacks.model_summary=null", "trainer.max_epochs=1", "trainer.limit_train_batches=20"),
)


def read_csv(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def read_scores(folder: Path) -> dict[str, float]:
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def write_run(folder: Path, *overrides: str, metrics: dict | None = None, error: str = "", **config) -> None:
    """Write a run folder as src.train leaves it, without training."""
    settings = OmegaConf.from_dotlist(list(overrides))
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    OmegaConf.save(OmegaConf.merge({"optimized_metric": "val/acc", **config}, settings), folder / ".hydra/config.yaml")
    if metrics is not None:
        results = {"data": "mnist", "epochs": 2, "parameters": 15_544, "seconds": {"fit": 2.0, "test": 1.0}}
        results |= {"choices": {"experiment": "null", "model": "cnn"}, "metrics": metrics}
        (folder / "metrics.json").write_text(json.dumps(results))
    if error:
        write_status(folder, "failed", error, "Traceback …" if error.startswith("ZeroDivisionError") else "")


def compare(*folders: Path) -> Comparison:
    return compare_runs(read_runs(folders))


def write_five_seeds(folder: Path) -> None:
    """Write a sweep of three learning rates of which 0.9 is worse by 0.003; the standard deviation is 0.0005."""
    draw = np.random.default_rng(0)
    for lr, mean in ("0.1", 0.993), ("0.3", 0.993), ("0.9", 0.990):
        for seed, score in enumerate(draw.normal(mean, 0.0005, 5)):
            metrics = {"val/acc": score, "val/loss": 0.012345, "test/acc": 0.99, "test/loss": 1 / 3}
            write_run(folder / f"{lr}_{seed}", f"optimizer.lr={lr}", f"seed={seed}", metrics=metrics)


def test_sweep_writes_csv_report_and_plots(finished_sweep):
    rows, page = read_csv(finished_sweep), (finished_sweep / "report.md").read_text()
    assert {(row["state"], row["optimizer.lr"], row["seed"]) for row in rows} == {
        ("finished", lr, seed) for lr in ("0.05", "0.2") for seed in "01"
    }
    for row in rows:
        results = json.loads((Path(row["folder"]) / "metrics.json").read_text())
        assert float(row["val/acc"]) == results["metrics"]["val/acc"] and row["parameters"] == "1788"
        assert float(row["seconds"]) == pytest.approx(sum(results["seconds"].values()))
    for plot in "heatmap.png", "losses.png":
        assert f"]({plot})" in page and image.imread(finished_sweep / plot).std() > 0.02
    means = {lr: fmean(float(row["val/acc"]) for row in rows if row["optimizer.lr"] == lr) for lr in ("0.05", "0.2")}
    best = max(means, key=means.get)
    assert re.search(rf"\| +1 \| +{100 * means[best]:.2f}% ± [^|]+ \| +{best} \|", page)


@pytest.mark.browser
def test_page_of_the_report_stands_alone_and_sorts_by_a_click(finished_sweep, browser, tmp_path):
    page, cells = browser.new_page(), "[...document.querySelectorAll('td:nth-child(3)')].map(cell => cell.textContent)"
    page.goto(shutil.copy(finished_sweep / "report.html", tmp_path / "alone.html").as_uri())
    assert page.evaluate("[...document.images].map(image => image.naturalWidth > 500)") == [True, True]
    for expected in ["0.05", "0.2"], ["0.2", "0.05"]:
        page.click("th:nth-child(3)")
        assert page.evaluate(cells) == expected and page.title().startswith("optimizer.lr, ")
    assert page.inner_text("pre").startswith("copy") and "python -m src.train -m" in page.inner_text("pre")
    page.close()


def test_printed_command_trains_the_best_setting_again_bitwise(run_main, tmp_path, monkeypatch):
    """Also if a file of conf/sweep/ sets more than the grid, and another key than the seed is averaged."""
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr("src.cli.hydra_main.CONF", tmp_path / "conf")
    sweep = {"average_over": ["seed", "data.seed"]}
    params = {"optimizer.lr": "0.05,0.2", "seed": "0,1", "data.seed": "5,6"}
    hydra = {"mode": "MULTIRUN", "callbacks": {"sweep": sweep}, "sweeper": {"params": params}}
    text = yaml.safe_dump({"trainer": {"max_epochs": 2}, "hydra": hydra})
    (tmp_path / "conf/sweep/mine.yaml").write_text(f"# @package _global_\n{text}")
    settings = *TINY[:2], "++callbacks.tensorboard=null", "trainer.limit_train_batches=3"
    result = run_main("sweep=mine", *settings, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    averaged = sweep["average_over"]
    best = compare_runs(read_runs([tmp_path / "sweep"]), averaged).best
    assert result.code == 0 and len(best.runs) == 4 and len(best.values) == 1, result.err
    words = shlex.split(next(line for line in result.out.splitlines() if "python -m src.train" in line))
    assert words[:4] == ["python", "-m", "src.train", "-m"]
    assert run_main(*words[3:], f"hydra.sweep.dir={tmp_path / 'again'}").code == 0
    again = compare_runs(read_runs([tmp_path / "again"]), averaged).best
    assert [read_weights(run.folder) for run in again.runs] == [read_weights(run.folder) for run in best.runs]
    assert {run.results["epochs"] for run in again.runs} == {2}
    assert shlex.split(format_train_command(replace(best, runs=best.runs[:1]), averaged))[3] != "-m"


def read_weights(folder: Path) -> dict[str, list]:
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {name: tensor.tolist() for name, tensor in state.items()}


def test_hparams_tab_has_every_swept_key_and_metric(finished_sweep):
    from tensorboard import default, program
    from tensorboard.backend.application import TensorBoardWSGIApp
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from werkzeug.test import Client

    board, folder = program.TensorBoard(plugins=default.get_plugins()), str(finished_sweep)
    board.configure(argv=[None, "--logdir", folder])
    runs = EventMultiplexer().AddRunsFromDirectory(folder)
    runs.Reload()
    provider = MultiplexerDataProvider(runs, folder)
    client = Client(TensorBoardWSGIApp(board.flags, board.plugin_loaders, provider, None, runs))

    def query(name: str, **body) -> dict:
        return client.post(f"/data/plugin/hparams/{name}", json=body).get_json()

    experiment = query("experiment", experimentName="", includeMetrics=True)
    differing = {info["name"] for info in experiment["hparamInfos"][:4]}  # which TensorBoard shows first
    assert differing == {"data.seed", "optimizer.lr", "scheduler.max_lr", "seed"}
    metrics = [info["name"] for info in experiment["metricInfos"]]
    tags = {metric["tag"] for metric in metrics}
    assert {"val/acc %", "val/loss", "test/acc %", "test/loss", "train/loss"} <= tags and "hp_metric" not in tags
    states = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    columns = [{"metric": metric} for metric in metrics]
    groups = query("session_groups", startIndex=0, sliceSize=100, allowedStatuses=states, colParams=columns)
    assert len(groups["sessionGroups"]) == 4
    for group in groups["sessionGroups"]:
        values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        name = group["sessions"][0]["name"]
        assert values["val/loss"] == pytest.approx(read_scores(finished_sweep / name)["val/loss"])
        assert name == f"optimizer.lr={group['hparams']['optimizer.lr']}_seed={group['hparams']['seed']:.0f}"


def test_runs_are_averaged_over_seeds_and_ranked_by_validation(tmp_path):
    for lr, scores, test in ("0.1", (0.90, 0.94), 0.99), ("0.3", (0.95, 0.97), 0.5):
        for seed, score in enumerate(scores):
            metrics = {"val/acc": score, "test/acc": test}
            write_run(tmp_path / f"{lr}_{seed}", f"optimizer.lr={lr}", f"seed={seed}", metrics=metrics)
    write_run(tmp_path / "nan", "optimizer.lr=9", "seed=0", metrics={"val/acc": math.nan, "test/acc": 1.0})
    comparison = compare(tmp_path)
    assert [group.values for group in comparison.groups] == [{"optimizer.lr": lr} for lr in ("0.3", "0.1", "9")]
    assert comparison.best.mean("val/acc") == pytest.approx(0.96)
    assert comparison.best.std("val/acc") == pytest.approx(0.0141421356)


def test_report_tests_significance_over_seeds(tmp_path, capsys):
    write_five_seeds(tmp_path)
    write_report([tmp_path], tmp_path)
    out, page = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    for text in out, page:
        verdicts = [row.split("|")[4].strip() for row in text.splitlines() if re.match(r"\| +[123] ", row)]
        assert verdicts == ["best", "tied", "worse"], text
    for file in tmp_path.glob("*_[1-4]/metrics.json"):
        file.unlink()
    write_report([tmp_path], tmp_path)
    assert "| vs. best |" not in capsys.readouterr().out


def test_sweep_over_seeds_has_mean_and_confidence_interval(tmp_path, capsys):
    for seed, score in enumerate((0.99, 0.98)):
        write_run(tmp_path / f"seed={seed}", f"seed={seed}", metrics={"val/acc": score})
    write_report([tmp_path], tmp_path)
    assert re.search(r"1 \| 98\.50% ± 0\.71% \| ± 6\.35%", capsys.readouterr().out)


def test_false_alarms_are_as_rare_as_promised():
    draw = np.random.default_rng(0)
    wrong = equal = found = 0
    for _ in range(1000):
        samples = [draw.normal(mean, 1, 5) for mean in (0, 0, -3)]
        ranks = sorted(range(3), key=lambda rank: -samples[rank].mean())
        p = dict(zip(ranks, [1, *corrected_p_values([samples[rank] for rank in ranks])], strict=True))
        found, wrong = found + (p[2] <= LEVEL), wrong + (min(p[0], p[1]) <= LEVEL)
        alike = sorted((draw.normal(0, 1, 5) for _ in range(3)), key=fmean)
        equal += min(corrected_p_values(alike)) <= LEVEL
    assert wrong <= 60 and equal <= 60 and found >= 900, (wrong, equal, found)


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_the_terminal_and_has_own_metrics(tmp_path, width):
    write_five_seeds(tmp_path)
    overrides = "optimizer.lr=0.2", "model=convolutions", "model.dropout=0.25"
    for seed in range(5):
        metrics = {"val/acc": 0.5 + seed / 1000, "test/rmse": 0.25}
        write_run(tmp_path / f"other_{seed}", *overrides, f"seed={seed}", metrics=metrics)
    comparison = compare(tmp_path)
    whole, fitting = (format_report(comparison, "title", width=limit) for limit in (1000, width))
    rows = [line for line in fitting.splitlines() if line.startswith("|")]
    assert max(map(len, rows)) <= width and "test/rmse" in whole and "0.2500 ± 0.0" in whole
    assert all(words in "".join(rows) for words in ("convolutions", "0.25", " ± ", "worse", "99.30")), rows


def test_edited_config_file_is_a_setting_of_its_own(tmp_path):
    for seed, decay in enumerate((0.1, 0.1, 0.2)):
        config = {"optimizer": {"weight_decay": decay}}
        write_run(tmp_path / str(seed), f"seed={seed}", metrics={"val/acc": 0.5 + decay}, **config)
    groups = compare(tmp_path).groups
    assert [group.values for group in groups] == [{"optimizer.weight_decay": x} for x in ("0.2", "0.1")]
    assert [len(group.runs) for group in groups] == [1, 2]


def test_repeats_count_once_and_are_named(tmp_path, capsys):
    for name, seed in ("a", 0), ("b", 0), ("c", 1_000_001), ("d", 1_000_002):
        write_run(
            tmp_path / name, f"seed={seed}", f"threads={len(name)}", metrics={"val/acc": 0.5}, data={"seed": seed}
        )
    comparison = write_report([tmp_path, tmp_path / "c"], tmp_path)  # c is read once
    assert comparison.best.scores("val/acc") == [0.5] * 3
    out = capsys.readouterr().out
    assert "3 finished, 1 repeat" in out and "Left out: 1\n\nb: repeat: same config and seed as a\n" in out


def test_only_keys_of_average_over_are_averaged(tmp_path):
    """data.seed follows seed by default; named, it distinguishes settings unless it is averaged over."""
    for number in range(4):
        overrides = f"seed={number % 2}", f"data.seed={number // 2}"
        write_run(tmp_path / str(number), *overrides, metrics={"val/acc": number / 10})
    comparison = compare(tmp_path)
    assert [group.values for group in comparison.groups] == [{"data.seed": "1"}, {"data.seed": "0"}]
    assert [len(group.runs) for group in comparison.groups] == [2, 2]
    comparison = compare_runs(read_runs([tmp_path]), ["seed", "data.seed"])
    assert sorted(comparison.best.scores("val/acc")) == [0, 0.1, 0.2, 0.3]


def test_lower_loss_ranks_first(tmp_path):
    config = {"optimized_metric": "val/loss", "optimized_mode": "min"}
    for lr, loss in ("0.1", 0.5), ("0.2", 0.25):
        write_run(tmp_path / lr, f"optimizer.lr={lr}", metrics={"val/loss": loss}, **config)
    assert compare(tmp_path).best.values == {"optimizer.lr": "0.2"}


def test_mode_is_inferred_from_the_metric_and_can_be_set(run_main, tmp_path):
    for name in "val_loss", "valLoss", "val/rmse", "ppl", "val/loss/dataloader_idx_0", "mean_absolute_error":
        assert infer_mode(name) == "min", name
    for name in "val/acc", "val/f1", "true_negative_rate", "frames", None:
        assert infer_mode(name) == "max", name
    arguments = *TINY, "optimized_metric=val/loss", "trainer.limit_train_batches=2"
    assert run_main(*arguments, f"hydra.run.dir={tmp_path / 'inferred'}").code == 0
    saved = yaml.safe_load((tmp_path / "inferred/.hydra/config.yaml").read_text())
    assert saved["optimized_mode"] == saved["callbacks"]["best"]["mode"] == "min"
    assert run_main(*arguments, "optimized_mode=max", f"hydra.run.dir={tmp_path / 'set'}").code == 0
    saved = yaml.safe_load((tmp_path / "set/.hydra/config.yaml").read_text())
    assert saved["callbacks"]["best"]["mode"] == "max"


@pytest.mark.parametrize(
    "config", [{"optimized_metric": "test/acc"}, {"optimized_metric": None}, {"data": {"test_every_epoch": True}}]
)
def test_runs_are_not_ranked_by_test_scores(tmp_path, capsys, config):
    for lr in "0.1", "0.2":
        write_run(tmp_path / lr, f"optimizer.lr={lr}", metrics={"val/acc": 0.5, "test/acc": 0.5}, **config)
    write_report([tmp_path], tmp_path)
    assert "not ranked" in capsys.readouterr().out and not (tmp_path / "heatmap.png").exists()


def test_report_lists_failed_and_unfinished_jobs(run_main, tmp_path):
    write_run(tmp_path / "a", "optimizer.lr=0.1", metrics={"val/acc": 0.5})
    write_run(tmp_path / "b", "optimizer.lr=0.2", error="ZeroDivisionError: by nothing")
    write_run(tmp_path / "c", "optimizer.lr=0.3")
    (tmp_path / "d/.hydra").mkdir(parents=True)
    (tmp_path / "d/.hydra/overrides.yaml").write_text("- 'optimizer.lr=0.4")  # killed while Hydra wrote it
    result = run_main(tmp_path, main=report.main)
    assert result.code == 0 and "1 finished, 1 failed, 2 unfinished" in result.out
    assert "b: failed: ZeroDivisionError: by nothing" in result.out
    states = sorted(row["state"] for row in read_csv(tmp_path))
    assert states == ["failed", "finished", "unfinished", "unfinished"]
    write_run(tmp_path / "e", "optimizer.lr=0.5", metrics={"val/acc": 0.5})
    (tmp_path / "e/metrics.json").write_text("{")
    result = run_main(tmp_path, main=report.main)
    assert result.code == 0 and f"e: unfinished: {tmp_path / 'e/metrics.json'}: damaged" in result.out


def test_report_compares_several_folders(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, epochs in ("one", 1), ("two", 2):
        write_run(tmp_path / name / "job", f"trainer.max_epochs={epochs}", metrics={"val/acc": epochs / 10})
    result = run_main("one", "two", main=report.main)
    assert result.code == 0 and "trainer.max_epochs=2: highest val/acc, 20.00%" in result.out
    assert [row["trainer.max_epochs"] for row in read_csv(tmp_path / "outputs/report")] == ["2", "1"]


def test_report_without_runs_prints_one_line(run_main, tmp_path):
    for folder in tmp_path, tmp_path / "missing":
        result = run_main(folder, main=report.main)
        assert result.code == 2 and len(result.err.splitlines()) == 1 and result.err.startswith("error: ")


def test_heat_map_shows_the_scores_over_one_key_or_two(tmp_path):
    for lr, dropout, score in ("0.1", "0", 0.9), ("0.1", "0.5", 0.8), ("1", "0", 0.1):
        overrides = f"optimizer.lr={lr}", f"model.dropout={dropout}"
        write_run(tmp_path / f"{lr}_{dropout}", *overrides, metrics={"val/acc": score})
    write_run(tmp_path / "failed", "optimizer.lr=1", "model.dropout=0.5", error="no")
    axes = plot_heat_map(compare(tmp_path)).axes[0]
    assert {text.get_text() for text in axes.texts} == {"90.00%", "80.00%", "10.00%"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.1", "1"]
    assert axes.patches[0].get_xy() == (-0.47, -0.47)  # around the best
    axes = plot_heat_map(compare(tmp_path / "0.1_0", tmp_path / "1_0")).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "1"]
    assert axes.get_xlabel() == "optimizer.lr"


def test_scores_are_plotted_over_each_key_where_there_is_no_grid(tmp_path):
    for number in range(1, 5):
        overrides = f"optimizer.lr={10**-number}", f"model.dropout={number / 10}", f"data.batch_size={number}"
        write_run(tmp_path / str(number), *overrides, metrics={"val/acc": number / 10})
    axes = plot_scores(comparison := compare(tmp_path)).axes
    assert [one.get_xlabel() for one in axes] == ["optimizer.lr", "model.dropout", "data.batch_size"]
    assert [one.get_xscale() for one in axes] == ["log", "linear", "linear"] and not plot_heat_map(comparison)
    assert axes[1].lines[-1].get_xydata().tolist() == [[0.4, 0.4]]


def test_failed_job_is_named_and_the_others_finish(run_main, tmp_path):
    result = run_main("-m", *TINY, "data.val_size=9,99999,8", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 1 and "Traceback" not in result.err and "2 finished, 1 failed" in result.out
    message = "data: 0 of 1,437 training images are not held out; lower data.val_size or data.train_size"
    assert f"error: data.val_size=99999: {message}" in result.err.splitlines()
    assert read_status(tmp_path / "data.val_size=99999") == {"state": "failed", "message": message, "traceback": ""}


def test_bug_in_a_job_keeps_its_traceback(run_main, tmp_path, monkeypatch):
    import lightning as L

    fit = L.Trainer.fit

    def fit_or_fail(trainer, module, data, **settings):
        if "seed=1" in trainer.default_root_dir:
            raise ZeroDivisionError("a bug")
        fit(trainer, module, data, **settings)

    monkeypatch.setattr(L.Trainer, "fit", fit_or_fail)
    result = run_main("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 1 and "error: seed=1: ZeroDivisionError: a bug" in result.err
    assert "in fit_or_fail" in read_status(tmp_path / "seed=1")["traceback"]
    assert (tmp_path / "seed=0/metrics.json").exists()


def test_sweep_continues_where_it_stopped_and_no_other_in_its_folder(run_main, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = "-m", *TINY, "scheduler=none", "seed=0,1", f"hydra.sweep.dir={tmp_path}"
    first, second = tmp_path / "seed=0", tmp_path / "seed=1"
    assert run_main(*arguments).code == 0
    scores, before = read_scores(second), (first / "metrics.json").stat()
    (second / "metrics.json").rename(second / ".metrics.json.part")  # as if killed while writing it
    result = run_main(*arguments)
    assert result.code == 0 and "already finished: seed=0" in result.out and "all runs: highest val/acc" in result.out
    assert (first / "metrics.json").stat() == before and read_scores(second) == scores
    for folder in first, second:  # one attempt's curve, not two
        assert len(EventAccumulator(str(folder)).Reload().Scalars("val/loss")) == 1
    result = run_main(*arguments, "optimizer.momentum=0.5")
    assert result.code == 2 and "holds a sweep of other jobs" in result.err
    assert (first / "metrics.json").stat() == before and len(result.err.splitlines()) == 1
    assert run_main(f"resume={first}", "trainer.max_epochs=2").code == 0
    assert "2 runs: 2 finished" in run_main(tmp_path, main=report.main).out
    result = run_main(*arguments[:-2], "seed=0,1,2", arguments[-1])  # more values are fine
    assert result.code == 0 and result.out.count("already finished") == 2
    assert {row["seed"]: row["trainer.max_epochs"] for row in read_csv(tmp_path)} == {"0": "2", "1": "1", "2": "1"}


@pytest.mark.parametrize("name, jobs", [("lr_dropout", 9), ("seeds", 5)])
def test_named_sweep_has_the_documented_jobs(name, jobs):
    sweeper = yaml.safe_load((CONF / f"sweep/{name}.yaml").read_text())["hydra"]["sweeper"]
    hydra = {"sweeper": sweeper, "overrides": {"task": [f"sweep={name}", "model.channels=[4,4]"]}}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert len(list_jobs(OmegaConf.create(hydra))) == jobs


@pytest.mark.slow
def test_killed_sweep_continues_to_bitwise_equal_weights(finished_sweep, run_main, tmp_path):
    arguments = "-m", *SMALL, "optimizer.lr=0.05,0.2", "seed=0,1", f"hydra.sweep.dir={tmp_path}"

    def list_finished() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/metrics.json")}

    process = subprocess.Popen([sys.executable, "-m", "src.train", *arguments], cwd=CONF.parent, start_new_session=True)
    while process.poll() is None and not (list_finished() and len(list(tmp_path.glob("*/events.*"))) > 1):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = list_finished()
    result = run_main(*arguments)
    assert result.code == 0 and result.out.count("already finished") == len(before) < 4
    assert before.items() <= list_finished().items() and "4 runs: 4 finished" in result.out
    for file in finished_sweep.glob("*/checkpoints/last.ckpt"):
        files = file, tmp_path / file.relative_to(finished_sweep)
        expected, weights = (torch.load(file, weights_only=True)["state_dict"] for file in files)
        assert all(torch.equal(expected[name], weights[name]) for name in expected)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["optimizer.lr=0.1,oops"], "optimizer.lr=oops: must be float > 0"),
        (["trainer.max_epochs=1,2", "+data.augment.x=1,2"], "data.augment.x: RandomAffine has no such"),
        (["seed=0,1", "model.dropout=2"], "model.dropout=2: must be"),
        (["optimizer=sgd,adamw", "optimizer.lr=-1,0.1"], "optimizer.lr=-1: must be"),
        (["optimizer=glob(x*)"], "a sweep without jobs"),
        (["seed=range(0)"], "seed=range(0)"),
        (["model=cnn,cn"], "Could not find 'model/cn'"),
        (["optimizer.lr=0.1,0.2", "hydra.sweep.subdir=${seed}"], "must contain ${hydra.job.override_dirname}"),
    ],
)
def test_sweep_with_a_mistake_trains_nothing(run_main, tmp_path, arguments, words):
    result = run_main("-m", *TINY, *arguments, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and words in result.err, result.err
    assert not list(tmp_path.iterdir())


def test_sweep_takes_globs_and_refuses_other_jobs_in_its_folder(run_main, tmp_path):
    arguments = "-m", *TINY, f"hydra.sweep.dir={tmp_path}"
    assert run_main(*arguments, "scheduler=glob([co*,none])").code == 0
    scores = {row["scheduler"]: row["val/acc"] for row in read_csv(tmp_path)}
    result = run_main(*arguments, "scheduler=plateau,none")
    assert result.code == 2 and "holds a sweep of other jobs" in result.err
    assert run_main(*arguments, "scheduler=cosine,none").code == 0
    assert {row["scheduler"]: row["val/acc"] for row in read_csv(tmp_path)} == scores and len(scores) == 2


def test_sweep_of_one_job_has_a_folder_for_it(run_main, tmp_path):
    assert run_main("-m", *TINY, "seed=0", f"hydra.sweep.dir={tmp_path}").code == 0
    assert [file.parent.name for file in tmp_path.glob("*/metrics.json")] == ["0"]


def test_folder_in_use_by_another_sweep_is_refused(run_main, tmp_path):
    with exclusive_lock(tmp_path):
        result = run_main("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 2 and "another process is using" in result.err


def test_signal_ends_a_sweep_which_continues(run_main, tmp_path, interrupt_at):
    interrupt_at(7, signal.SIGTERM)
    result = run_main("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert result.code == 143 and not (tmp_path / "sweep/seed=1").exists()
    (line,) = [line for line in result.err.splitlines() if "continue with" in line]
    command = shlex.split(line)
    assert run_main(*command[command.index("src.train") + 1 :]).code == 0
    assert run_main(*TINY, "seed=0", f"hydra.run.dir={tmp_path / 'whole'}").code == 0
    assert read_weights(tmp_path / "sweep/seed=0") == read_weights(tmp_path / "whole")
    assert len(list(tmp_path.glob("sweep/*/metrics.json"))) == 2


def test_sweep_on_a_terminal_prints_one_line_per_job(run_main, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    lines = run_main("-m", *SMALL, "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={tmp_path / 'sweep'}").out.splitlines()
    jobs = [line for line in lines if re.match(r"\d of 2  optimizer.lr=0.\d  \d+.\d\d%$", line)]
    assert [line[0] for line in jobs] == ["1", "2"]
    assert not any(line.startswith(("epoch", "next", "layer")) for line in lines)


@pytest.mark.parametrize("mark", ["status.json", ".tune"])
def test_folder_of_a_run_or_a_study_is_refused(run_main, tmp_path, mark):
    (tmp_path / mark).write_text("{}")
    result = run_main("-m", *TINY, "seed=0,1", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 2 and ": holds a " in result.err and len(result.err.splitlines()) == 1
