import re

import pytest

from src.benchmark.__main__ import main


def test_ratio_is_that_of_the_printed_speeds(run_main, monkeypatch):
    monkeypatch.setattr("src.benchmark.speed.TIMED", 2)
    result = run_main("data=digits", "model.channels=[4,4,4,4,4,4]", "--rounds", 2, main=main)
    assert result.code == 0, result.err
    own, bare = (float(speed.replace(",", "")) for speed in re.findall(r"([\d,]+) images/s$", result.out, re.M))
    ratio, error = map(float, re.search(r"^ratio +([\d.]+) ± ([\d.]+)$", result.out, re.M).groups())
    assert (own - 0.5) / (bare + 0.5) - 0.001 < ratio < (own + 0.5) / (bare - 0.5) + 0.001 and error < ratio


@pytest.mark.slow
def test_time_to_accuracy_compares_whole_runs(run_main):
    seeds = "--seeds", 2, "--baseline-seeds", 2, "seed=3"
    short = "experiment=fast", "data=digits", "trainer.max_steps=30", *seeds
    result = run_main("--time-to", 30, *short, main=main)
    assert result.code == 0, result.err
    runs = re.findall(r"^fast  seed [34]  ([\d.]+)% at the end, ([\d.]+) s$", result.out, re.M)
    baselines = re.findall(r"^baseline  seed [34]  ([\d.]+)% after (\d+) epochs, ([\d.]+) s$", result.out, re.M)
    assert len(runs) == len(baselines) == 2 and all(float(accuracy) >= 30 for accuracy, *_ in baselines)
    score = re.search(r"^fast  ([\d.]+) ± .* ([\d.-]+) to ([\d.]+)%", result.out, re.M)
    mean, low, high = map(float, score.groups())
    assert mean == pytest.approx(sum(float(accuracy) for accuracy, _ in runs) / 2, abs=0.011) and low <= mean <= high
    own, other = (sum(float(seconds) for *_, seconds in lines) for lines in (runs, baselines))
    ratio, error = map(float, re.search(r"^ratio +([\d.]+) ± ([\d.]+)", result.out, re.M).groups())
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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("modle=cnn",), "did you mean"),
        (("--seeds", "x"), "--seeds"),
        (("seed=abc",), "0 ≤ int"),
    ],
)
def test_mistake_prints_one_line(run_main, arguments, words):
    result = run_main(*arguments, main=main)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
