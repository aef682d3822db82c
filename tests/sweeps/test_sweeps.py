"""Sweeps: their report, their failures, how they go on after an interruption, and how they run in parallel."""

import csv
import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
import torch
import yaml
from matplotlib import pyplot as plt
from omegaconf import OmegaConf
from rich.console import Console

from src import report, tune
from src.core.config import CONF
from src.core.run_folder import format_continue_command, read_status, write_status
from src.sweeps import tables
from src.sweeps.plots import plot_heat_map, plot_line
from src.sweeps.report import write_report
from src.sweeps.runs import compare_runs, format_train_command, read_runs
from src.sweeps.stats import LEVEL, confidence_interval, corrected_p_values, required_seeds

TINY = (
    "callbacks.tensorboard=null",  # half of so short a run
    "model.channels=[4,4,4,4,4,4]",
    "data=digits",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=20",
    "optimizer.lr=0.1",
    "callbacks.model_summary=null",
)
SWEEP = (
    *("-m", *TINY, "optimizer.lr=0.03,0.1", "model.dropout=0,0.1", "seed=0,1"),
    *("callbacks.resume.every_steps=5", "data.batch_size=16"),
)


def sheet(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def pretend(folder: Path, *overrides: str, metrics: dict[str, float] | None = None, error: str = "", **config) -> None:
    """A run folder as src.train leaves it, without a training."""
    settings = OmegaConf.from_dotlist(list(overrides))
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text(yaml.safe_dump(list(overrides)))
    OmegaConf.save(OmegaConf.merge({"optimized_metric": "val/acc", **config}, settings), folder / ".hydra/config.yaml")
    if metrics is not None:
        seed = int(settings.get("seed", 0))
        results = {
            "data": "mnist",
            "epochs": 2,
            "parameters": 15_544,
            "seed": seed,
            "seconds": {"fit": 2.0, "test": 1.0},
            "choices": {"experiment": "null", "model": "cnn"},
        }
        (folder / "metrics.json").write_text(json.dumps({**results, "metrics": metrics}))
    if error:
        trace = "Traceback …" if error.startswith("ZeroDivisionError") else ""
        write_status(folder, "failed", error, trace)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """A real sweep over two learning rates, two dropouts and two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        from src import train

        patch.setattr(sys, "argv", ["src/train.py", *SWEEP, f"hydra.sweep.dir={folder}"])
        train.main()
    return folder


def test_sweep_writes_csv_report_and_plots(swept):
    rows = sheet(swept)
    assert len(rows) == 8 and {row["state"] for row in rows} == {"finished"}
    assert {(row["optimizer.lr"], row["model.dropout"], row["seed"]) for row in rows} == {
        (lr, dropout, seed) for lr in ("0.03", "0.1") for dropout in ("0", "0.1") for seed in "01"
    }
    for row in rows:
        results = json.loads((Path(row["folder"]) / "metrics.json").read_text())
        assert float(row["val/acc"]) == results["metrics"]["val/acc"] and row["parameters"] == "1788"
        assert float(row["seconds"]) == pytest.approx(sum(results["seconds"].values()))
    page = (swept / "report.md").read_text()
    for picture in "heatmap.png", "losses.png":
        assert f"]({picture})" in page and plt.imread(swept / picture).std() > 0.05
    means = {s: mean_of(rows, s) for s in {row["optimizer.lr"] + " " + row["model.dropout"] for row in rows}}
    first = []
    for setting, mean in means.items():
        if math.isclose(mean, max(means.values())):  # several, in a tie
            x = [100 * float(r["val/acc"]) for r in rows if f"{r['optimizer.lr']} {r['model.dropout']}" == setting]
            first.append(f"| 1 | {setting.replace(' ', ' | ')} | {fmean(x):.2f} ± {stdev(x):.2f} |")
    assert sum(line in page for line in first) == 1


def mean_of(rows: list[dict[str, str]], setting: str) -> float:
    return fmean(float(r["val/acc"]) for r in rows if f"{r['optimizer.lr']} {r['model.dropout']}" == setting)


def test_printed_command_trains_the_best_setting_again_bitwise(swept, run_main, tmp_path):
    winners = compare_runs(read_runs([swept])).best.runs
    words = shlex.split(format_train_command(winners))
    assert words[:4] == ["python", "-m", "src.train", "-m"] and words[-1] == "seed=0,1"
    assert run_main(*words[3:], f"hydra.sweep.dir={tmp_path}").code == 0
    for winner in winners:
        again = json.loads((tmp_path / f"seed={winner.seed}/metrics.json").read_text())
        assert again["metrics"] == winner.results["metrics"]
    words = shlex.split(format_train_command(winners[:1]))
    assert "-m" not in words[3:] and words[-1] == "seed=0"


def test_hparams_tab_has_every_swept_key_and_metric(swept):
    from tensorboard import default, program
    from tensorboard.backend.application import TensorBoardWSGIApp
    from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
    from werkzeug.test import Client

    board = program.TensorBoard(plugins=default.get_plugins())
    board.configure(argv=[None, "--logdir", str(swept)])
    runs = EventMultiplexer().AddRunsFromDirectory(str(swept))
    runs.Reload()
    app = TensorBoardWSGIApp(board.flags, board.plugin_loaders, MultiplexerDataProvider(runs, str(swept)), None, runs)
    client = Client(app)

    asked = {"experimentName": "", "includeMetrics": True}
    experiment = client.post("/data/plugin/hparams/experiment", json=asked).get_json()
    keys = [info["name"] for info in experiment["hparamInfos"]]
    assert keys[:3] == ["model.dropout", "optimizer.lr", "seed"]  # what differs comes first
    metrics = [info["name"] for info in experiment["metricInfos"]]
    assert {"val/acc %", "val/loss", "test/acc %", "test/loss", "train/loss"} <= {m["tag"] for m in metrics}
    assert "hp_metric" not in {m["tag"] for m in metrics}

    asked = {
        "startIndex": 0,
        "sliceSize": 100,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": metric} for metric in metrics],
    }
    groups = client.post("/data/plugin/hparams/session_groups", json=asked).get_json()["sessionGroups"]
    assert len(groups) == 8
    for group in groups:
        found = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
        name = group["sessions"][0]["name"]
        for tag, value in json.loads((swept / name / "metrics.json").read_text())["metrics"].items():
            is_accuracy = tag.endswith("/acc")
            assert found[f"{tag} %" if is_accuracy else tag] == pytest.approx(value * (100 if is_accuracy else 1))
        parts = dict(part.split("=") for part in name.replace("_seed", ",seed").replace("_opt", ",opt").split(","))
        assert {key: group["hparams"][key] for key in parts} == {key: float(value) for key, value in parts.items()}


def test_settings_are_averaged_over_seeds_and_ranked_by_validation(tmp_path):
    for lr, scores, test in ("0.1", (0.90, 0.94), 0.99), ("0.3", (0.95, 0.97), 0.5):
        for seed, score in enumerate(scores):
            metrics = {"val/acc": score, "test/acc": test}
            pretend(tmp_path / f"{lr}_{seed}", f"optimizer.lr={lr}", f"seed={seed}", metrics=metrics)
    pretend(tmp_path / "nan", "optimizer.lr=9", "seed=0", metrics={"val/acc": math.nan, "test/acc": 1.0})
    found = compare_runs(read_runs([tmp_path]))
    assert found.keys == ["optimizer.lr"] and [setting.values["optimizer.lr"] for setting in found.settings] == [
        *("0.3", "0.1", "9"),
    ]
    assert found.best.mean("val/acc") == pytest.approx(0.96)
    assert found.best.std("val/acc") == pytest.approx(0.0141421356)


def five_seeds(folder: Path, gap: float, seed: int) -> None:
    """A sweep of three learning rates, two of them equally good; 0.9 is worse by `gap`, the spread is 0.0005."""
    draw = np.random.default_rng(seed)
    for lr, mean in ("0.1", 0.993), ("0.3", 0.993), ("0.9", 0.993 - gap):
        for number, score in enumerate(draw.normal(mean, 0.0005, 5)):
            pretend(folder / f"{lr}_{number}", f"optimizer.lr={lr}", f"seed={number}", metrics={"val/acc": score})


def test_report_tests_significance_over_seeds(tmp_path, capsys):
    five_seeds(tmp_path, gap=0.003, seed=0)
    write_report([tmp_path], tmp_path)
    out, page = capsys.readouterr().out, (tmp_path / "report.md").read_text()
    for said in out, page:
        assert "worse than the best: optimizer.lr=0.9\n" in said
        assert re.search(r"tied with the best: optimizer.lr=0\.[13]\n", said)
        assert re.search(
            r"finding the 0\.\d+ points to optimizer.lr=0.[13] with 80% power takes (about|more than) [\d,]+", said
        )
    assert [row.split()[5] for row in out.splitlines() if row.startswith(("  1", "  2", "  3"))] == [
        "tied",
        "tied",
        "worse",
    ]
    for file in tmp_path.glob("*_[1-4]/metrics.json"):
        file.unlink()
    write_report([tmp_path], tmp_path)
    assert "not tested (one seed per setting)" in capsys.readouterr().out


def test_sweep_over_seeds_has_mean_and_confidence_interval(tmp_path, capsys):
    for seed, score in enumerate((0.99, 0.98)):
        pretend(tmp_path / f"seed={seed}", f"seed={seed}", metrics={"val/acc": score})
    write_report([tmp_path], tmp_path)
    assert re.search(r"1 +2 runs +98\.50 ± 0\.71 +92\.15 to 100\.00", capsys.readouterr().out)


def test_false_alarms_and_coverage_are_as_promised():
    draw = np.random.default_rng(0)
    covered = wrong = equal = found = 0
    for _ in range(1000):
        samples = [draw.normal(mean, 1, 5) for mean in (0, 0, -3)]
        covered += confidence_interval(samples[0])[0] < 0 < confidence_interval(samples[0])[1]
        places = sorted(range(3), key=lambda place: -samples[place].mean())
        different = {places[0]: False} | {
            place: p <= LEVEL
            for place, p in zip(places[1:], corrected_p_values([samples[place] for place in places]), strict=True)
        }
        found, wrong = found + different[2], wrong + (different[0] or different[1])
        alike = sorted((draw.normal(0, 1, 5) for _ in range(3)), key=fmean)
        equal += min(corrected_p_values(alike)) <= LEVEL
    assert 930 <= covered <= 970 and wrong <= 60 and equal <= 60 and found >= 900, (covered, wrong, equal, found)


def test_required_seeds_have_the_promised_power():
    draw, found = np.random.default_rng(0), 0
    known = np.sqrt(0.5) * np.array([-1, 1])  # of standard deviation 1
    seeds = required_seeds(known, known + 1.5, settings=3)
    for _ in range(500):
        samples = [draw.normal(mean, 1, seeds) for mean in (1.5, 0, 0.75)]
        found += corrected_p_values(samples)[0] <= LEVEL
    assert 0.75 < found / 500 < 0.87
    assert required_seeds([1, 1.1], [1.05, 1.0501], 3) is None


@pytest.mark.parametrize("width", [80, 100])
def test_table_fits_the_terminal(tmp_path, monkeypatch, width):
    five_seeds(tmp_path, gap=0.003, seed=0)
    for file in tmp_path.glob("*/metrics.json"):
        results = json.loads(file.read_text())
        results["metrics"] |= {"val/loss": 0.012345, "test/acc": 0.99, "test/loss": 1 / 3}
        file.write_text(json.dumps(results))
    for seed in range(5):
        overrides = "optimizer.lr=0.2", "model=separable_cnn", "model.dropout=0.25", f"seed={seed}"
        pretend(tmp_path / f"other_{seed}", *overrides, metrics={"val/acc": 0.5 + seed / 1000, "val/loss": 123456.0})
    out = io.StringIO()
    monkeypatch.setattr(tables, "Console", lambda **how: Console(file=out, width=width, force_terminal=True, **how))
    tables.print_comparison(compare_runs(read_runs([tmp_path])), "title")
    said = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
    table = said[: said.index("Best:")].splitlines()
    assert max(map(len, table[1:])) <= width
    for words in "0.25", " ± ", "worse", "99.30":
        assert any(words in line for line in table), said


def test_default_option_of_a_swept_group_is_shown(tmp_path):
    for name in "source", "":
        pretend(tmp_path / f"run{name}", *[f"experiment={name}"] * bool(name), metrics={"val/acc": 0.5})
    assert {setting.values["experiment"] for setting in compare_runs(read_runs([tmp_path])).settings} == {
        "source",
        "null",
    }


def test_edited_config_file_is_a_setting_of_its_own(tmp_path):
    for seed, decay in enumerate((0.1, 0.1, 0.2)):
        config = {"optimizer": {"weight_decay": decay}}
        pretend(tmp_path / str(seed), f"seed={seed}", metrics={"val/acc": 0.5 + decay}, **config)
    settings = compare_runs(read_runs([tmp_path])).settings
    assert [setting.values for setting in settings] == [{"optimizer.weight_decay": x} for x in ("0.2", "0.1")]
    assert [len(setting.runs) for setting in settings] == [1, 2]


def test_the_same_seed_twice_counts_once(tmp_path):
    for name in "ab":
        pretend(tmp_path / name, "seed=0", metrics={"val/acc": 0.5})
    assert compare_runs(read_runs([tmp_path])).best.scores("val/acc") == [0.5]


def test_lower_loss_ranks_first(tmp_path):
    for lr, loss in ("0.1", 0.5), ("0.2", 0.25):
        pretend(
            tmp_path / lr,
            f"optimizer.lr={lr}",
            metrics={"val/loss": loss},
            optimized_metric="val/loss",
            optimized_mode="min",
        )
    assert compare_runs(read_runs([tmp_path])).best.values == {"optimizer.lr": "0.2"}


@pytest.mark.parametrize(
    "config",
    [{"optimized_metric": "test/acc"}, {"optimized_metric": None}, {"data": {"test_every_epoch": True}}],
)
def test_runs_are_not_ranked_by_test_scores(tmp_path, capsys, config):
    for lr in "0.1", "0.2":
        pretend(tmp_path / lr, f"optimizer.lr={lr}", metrics={"val/acc": 0.5, "test/acc": 0.5}, **config)
    write_report([tmp_path], tmp_path)
    assert "not ranked" in capsys.readouterr().out and not (tmp_path / "line.png").exists()


def test_report_lists_failed_unfinished_and_missing_jobs(tmp_path, capsys):
    pretend(tmp_path / "a", "optimizer.lr=0.1", metrics={"val/acc": 0.5})
    pretend(tmp_path / "b", "optimizer.lr=0.2", error="ZeroDivisionError: by nothing")
    pretend(tmp_path / "c", "optimizer.lr=0.3")
    (tmp_path / "d/.hydra").mkdir(parents=True)
    (tmp_path / "d/.hydra/overrides.yaml").write_text("- 'optimizer.lr=0.4")  # killed while Hydra wrote it
    overrides = {"task": ["optimizer.lr=0.1,0.2,0.3,0.4"], "hydra": ["hydra.mode=MULTIRUN", "hydra/launcher=joblib"]}
    hydra = {"overrides": overrides, "sweeper": {"params": None}, "callbacks": {"sweep": {"zip": []}}}
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    write_report([tmp_path], tmp_path)
    out = capsys.readouterr().out
    assert "1 finished, 1 failed, 2 unfinished, 1 not started" in out
    assert "b: ZeroDivisionError: by nothing" in out
    command = "python -m src.train -m optimizer.lr=0.1,0.2,0.3,0.4 hydra/launcher=joblib"
    assert f"{command} hydra.sweep.dir={tmp_path}" in out
    assert out.index("0.1") < out.index("0.2")
    assert sorted(row["state"] for row in sheet(tmp_path)) == [
        *("failed", "finished", "not started", "unfinished", "unfinished"),
    ]


def test_report_compares_several_folders(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, epochs in ("one", 1), ("two", 2):
        pretend(tmp_path / name / "job", f"trainer.max_epochs={epochs}", metrics={"val/acc": epochs / 10})
    result = run_main("one", "two", main=report.main)
    assert result.code == 0
    assert [row["trainer.max_epochs"] for row in sheet(tmp_path / "outputs/report")] == ["2", "1"]
    assert "trainer.max_epochs=2: val/acc 20.00%" in result.out


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_report_without_runs_prints_one_line(run_main, tmp_path, make):
    make(tmp_path / "empty")
    result = run_main(tmp_path / "empty", main=report.main)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and result.err.startswith("error: ")


def test_heat_map_and_line_show_the_scores(tmp_path):
    values = {("0.1", "0"): 0.9, ("0.1", "0.5"): 0.8, ("1", "0"): 0.1}
    for (lr, dropout), score in values.items():
        pretend(
            tmp_path / f"{lr}_{dropout}", f"optimizer.lr={lr}", f"model.dropout={dropout}", metrics={"val/acc": score}
        )
    pretend(tmp_path / "failed", "optimizer.lr=1", "model.dropout=0.5", error="no")
    axes = plot_heat_map(compare_runs(read_runs([tmp_path]))).axes[0]
    assert {text.get_text() for text in axes.texts} == {"90.00", "80.00", "10.00", "failed"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.1", "1"]
    (frame,) = axes.patches
    assert frame.get_xy() == (-0.5, -0.5)
    axes = plot_line(compare_runs(read_runs([tmp_path / "0.1_0", tmp_path / "1_0"]))).axes[0]
    assert axes.get_xscale() == "log" and sorted(axes.lines[-1].get_ydata()) == pytest.approx([10, 90])
    plt.close("all")


def test_failed_job_is_named_and_the_others_finish(run_main, tmp_path):
    result = run_main("-m", *TINY, "optimizer.lr=0.1,-1,0.2,0.3", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 2 and "Traceback" not in result.err
    assert "failed: optimizer.lr=-1: optimizer.lr=-1: must be float > 0" in result.err.splitlines()
    assert len(list(tmp_path.glob("*/metrics.json"))) == 3
    assert "3 finished, 1 failed" in result.out
    status = {"state": "failed", "message": "optimizer.lr=-1: must be float > 0", "traceback": ""}
    assert read_status(tmp_path / "optimizer.lr=-1") == status


def test_bug_in_a_job_keeps_its_traceback(run_main, tmp_path, monkeypatch):
    import lightning as L

    fit = L.Trainer.fit

    def broken(trainer, module, data, **settings):
        if "seed=1" in trainer.default_root_dir:
            raise ZeroDivisionError("a bug")
        fit(trainer, module, data, **settings)

    monkeypatch.setattr(L.Trainer, "fit", broken)
    result = run_main("-m", *TINY, "seed=0,1,2", f"hydra.sweep.dir={tmp_path}")
    assert result.code == 1 and "failed: seed=1: ZeroDivisionError: a bug" in result.err
    assert "in broken" in read_status(tmp_path / "seed=1")["traceback"]
    assert len(list(tmp_path.glob("*/metrics.json"))) == 2


def test_sweep_continues_where_it_stopped(swept, run_main, tmp_path):
    arguments = "-m", *TINY, "seed=0,1", "model.dropout=0.1", "optimizer.lr=0.1", f"hydra.sweep.dir={tmp_path}"
    done, begun = tmp_path / "seed=0", tmp_path / "seed=1"
    assert run_main(*arguments).code == 0
    results = [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (done, begun)]
    before = (done / "metrics.json").stat()
    (begun / "metrics.json").rename(begun / ".metrics.json.part")  # as if killed while writing it
    result = run_main(*arguments)
    assert result.code == 0 and "already finished: seed=0" in result.out and "2 runs: 2 finished" in result.out
    assert (done / "metrics.json").stat() == before
    assert [json.loads((folder / "metrics.json").read_text())["metrics"] for folder in (done, begun)] == results
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curves = [EventAccumulator(str(folder)).Reload().Scalars("val/loss") for folder in (done, begun)]
    assert len(curves[0]) == len(curves[1]) == 1  # one attempt's curve, not two


def test_different_sweep_in_the_same_folder_is_refused(run_main, tmp_path):
    where = f"hydra.sweep.dir={tmp_path}"
    assert run_main("-m", *TINY, "seed=0,1", where).code == 0
    before = [(file, file.stat().st_mtime_ns) for file in tmp_path.glob("*/metrics.json")]
    result = run_main("-m", *TINY, "seed=0,1,2", "optimizer.momentum=0.5", where)
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "optimizer.momentum=0.5: the sweep in" in result.err
    assert [(file, file.stat().st_mtime_ns) for file in tmp_path.glob("*/metrics.json")] == before
    assert run_main("-m", *TINY, "seed=0,1,2", where).out.count("already finished") == 2  # more of the same is fine


def test_named_sweeps_have_the_documented_jobs(run_main):
    for name, count in ("lr_dropout", 9), ("seeds", 5):
        params = OmegaConf.load(CONF / f"sweep/{name}.yaml").hydra.sweeper.params
        from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
        from hydra.core.override_parser.overrides_parser import OverridesParser

        parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
        assert len(BasicSweeper.split_arguments(parsed, None)[0]) == count


def start(*arguments: str) -> subprocess.Popen:
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    command = [sys.executable, "-m", "src.train", *arguments]
    return subprocess.Popen(command, cwd=CONF.parent, start_new_session=True, **quiet)


@pytest.mark.slow
def test_killed_sweep_continues_to_bitwise_equal_weights(swept, run_main, tmp_path):
    folder = tmp_path

    def finished() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in folder.glob("*/metrics.json")}

    def in_a_job() -> bool:
        begun = {file.parent for file in folder.glob("*/events.*")}
        return bool(begun - {file.parent for file in finished()})

    kept: dict[Path, int] = {}
    for stop_now in lambda: len(finished()) >= 3, lambda: len(finished()) >= 4 and in_a_job():
        process = start(*SWEEP, f"hydra.sweep.dir={folder}")
        while not stop_now() and process.poll() is None:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert kept.items() <= finished().items() and len(kept) < len(finished()) < 8
        kept = finished()

    result = run_main(*SWEEP, f"hydra.sweep.dir={folder}")
    assert result.code == 0 and result.out.count("already finished") == len(kept)
    assert kept.items() <= finished().items() and len(finished()) == 8 == len(sheet(folder))
    for job in finished():
        one, other = (
            torch.load(sweep / job.parent.name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for sweep in (swept, folder)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_continue_command_of_a_named_sweep(tmp_path):
    hydra = ["hydra.sweep.dir=x", "hydra.job.config.override_dirname.exclude_keys=[sweep]"]
    overrides = {"task": ["sweep=seeds", "model.channels=[4,4,4,4,4,4]"], "hydra": hydra}
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": overrides}}))
    assert format_continue_command(tmp_path / "multirun.yaml") == (
        f"python -m src.train sweep=seeds 'model.channels=[4,4,4,4,4,4]' hydra.sweep.dir={tmp_path}"
    )


def test_study_reaches_its_target_and_prunes(run_main, tmp_path, monkeypatch):
    optuna = pytest.importorskip("optuna")
    arguments = [one for one in TINY if "max_epochs" not in one]
    arguments += [
        "trainer.max_epochs=2",
        "data.batch_size=16",
        "pruner.n_startup_trials=2",
        "pruner.n_warmup_steps=0",
        "search.optimizer.lr.low=0.0001",
        f"hydra.run.dir={tmp_path}",
    ]

    def trials() -> list:
        return optuna.load_study(study_name=None, storage=f"sqlite:///{tmp_path}/study.db").trials

    for target, there in (4, 4), (8, 8), (8, 8):
        result = run_main(*arguments, f"n_trials={target}", main=tune.main)
        assert result.code == 0, result.err
        assert len(trials()) == there
    assert "8 of 8 trials are done" in result.out
    states = [trial.state.name for trial in trials()]
    assert set(states) == {"COMPLETE", "PRUNED"}
    assert f"8 runs: {states.count('COMPLETE')} finished, {states.count('PRUNED')} pruned" in result.out
    assert len({str(trial.params) for trial in trials()}) == 8
    rows = [row for row in sheet(tmp_path) if row["state"] == "finished"]
    complete = [trial.value for trial in trials() if trial.state.name == "COMPLETE"]
    assert sorted(float(row["val/acc"]) for row in rows) == pytest.approx(sorted(complete))

    assert all(len(key.split("=")[1]) <= 11 for trial in tmp_path.glob("0*") for key in trial.name.split("_")[1:])
    page = (tmp_path / "report.md").read_text()
    for picture in (
        f"tune_{name}.png" for name in ("optimization_history", "parallel_coordinate", "param_importances")
    ):
        assert f"]({picture})" in page and plt.imread(tmp_path / picture).std() > 0.05

    result = run_main(*arguments, "n_trials=9", "optimizer.momentum=0.5", main=tune.main)
    assert result.code == 2 and "optimizer.momentum=0.5: the study in" in result.err.splitlines()[-1]


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("optimized_metric=test/acc", "must not choose anything"),
        ("search.optimizer.lr.suggest=flaot", "must be one of float, int, categorical"),
        ("search.optimizer.lr.low=5", "search.optimizer.lr"),
        ("trial=5", "did you mean n_trials?"),
        ("n_trials=0", "must be int ≥ 1"),
        ("study_name=a?b", "must be string without ? or #"),
        ("search.optimizer=3", "search.optimizer=3: must be keys with their ranges"),
    ],
)
def test_mistake_in_a_study_prints_one_line(run_main, tmp_path, mistake, words):
    result = run_main(*TINY, "n_trials=1", mistake, f"hydra.run.dir={tmp_path}", main=tune.main)
    assert result.code == 2 and words in result.err.splitlines()[-1] and "Traceback" not in result.err
