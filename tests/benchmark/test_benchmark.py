import re
from types import SimpleNamespace

import pytest
import torch

from src.benchmark import speed
from src.benchmark.__main__ import main

TINY = "data=digits", "model.channels=[4,4,4,4,4,4]", "--batches", 2, "--rounds", 1


def test_ratios_are_those_of_the_printed_speeds(run_main):
    result = run_main(*TINY, main=main)
    assert result.code == 0, result.err
    speeds = dict(re.findall(r"^([abc]) +([\d,]+) i", result.out, re.M))
    ratios = dict(re.findall(r"^b/([ac]) +([\d.]+)", result.out, re.M))
    assert set(ratios) == {"a", "c"}
    for name, ratio in ratios.items():
        own, other = (float(speeds[run].replace(",", "")) for run in ("b", name))  # rounded to whole numbers
        low, high = (own - 0.5) / (other + 0.5), (own + 0.5) / (other - 0.5)
        assert low - 0.001 < float(ratio) < high + 0.001


def test_runs_take_turns(monkeypatch):
    turns, steps = [], []
    monkeypatch.setattr(speed, "WARMUP", 1)
    timer = speed.InterleavedTimer(2, 2)
    timer.others = {name: iter(lambda name=name: steps.append(name), 0) for name in "ca"}
    module = SimpleNamespace(device=torch.device("cpu"))
    for step in range(2 * 3 + 1):
        timer.on_train_batch_start(SimpleNamespace(global_step=step), module, None, step)
        turns.append("".join(steps))
        steps.clear()
    assert turns == ["cccaaa", "", "", "cccaaa", "", "", ""]
    assert {name: len(seconds) for name, seconds in timer.seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(duration > 0 for seconds in timer.seconds.values() for duration in seconds)


@pytest.mark.slow
def test_time_to_accuracy_compares_whole_runs(run_main):
    seeds = "--seeds", 2, "--baseline-seeds", 2, "seed=3"
    short = "experiment=fast", "data=digits", "trainer.max_steps=30", *seeds
    result = run_main("--time-to", 30, *short, main=main)
    assert result.code == 0, result.err
    runs = re.findall(r"^b  seed [34]  ([\d.]+)% at the end, ([\d.]+) s$", result.out, re.M)
    baselines = re.findall(r"^c  seed [34]  ([\d.]+)% after (\d+) epochs, ([\d.]+) s$", result.out, re.M)
    assert len(runs) == len(baselines) == 2 and all(float(accuracy) >= 30 for accuracy, *_ in baselines)
    mean, low, high = map(float, re.search(r"^b    ([\d.]+) ± .* ([\d.-]+) to ([\d.]+)%", result.out, re.M).groups())
    assert mean == pytest.approx(sum(float(accuracy) for accuracy, _ in runs) / 2, abs=0.011) and low <= mean <= high
    own, other = (sum(float(seconds) for *_, seconds in lines) for lines in (runs, baselines))
    ratio, error = map(float, re.search(r"^c/b +([\d.]+) ± ([\d.]+)", result.out, re.M).groups())
    assert ratio == pytest.approx(other / own, abs=0.1 + 0.4 / own) and error < other / own


def test_time_to_accuracy_computes_soft_labels_for_each_seed(run_main, tmp_path, small_weights):
    pytest.importorskip("src.distillation", reason="distillation is deleted")
    target = "src.distillation.soft_labels.SoftLabels"
    soft_labels = f"+data.soft_labels={{_target_:{target},teachers:[{small_weights}],folder:{tmp_path / 'cache'}}}"
    seeds = "--seeds", 2, "--baseline-seeds", 1
    short = "experiment=fast", "data=digits", soft_labels, "trainer.max_steps=3", *seeds, "task.distill_weight=0"
    result = run_main("--time-to", 1, *short, main=main)
    assert result.code == 0, result.err
    assert result.err.count("computing teacher outputs, epoch 1") == 2 and not (tmp_path / "cache").exists()
    assert "the bare loop has no distillation" in run_main("data=digits", soft_labels, main=main).err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("modle=cnn",), "did you mean"),
        (("--rounds", 0), "--rounds"),
        (("seed=abc",), "0 ≤ int"),
    ],
)
def test_mistake_prints_one_line(run_main, arguments, words):
    result = run_main(*arguments, main=main)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
