import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from src.benchmark import speed
from src.benchmark.__main__ import main

CPU = torch.device("cpu")
TINY = "data=digits", "model.channels=[4,4,4,4,4,4]", "--batches", 2, "--rounds", 1


def test_the_ratios_are_those_of_the_speeds(run_main):
    result = run_main(*TINY, main=main)
    assert result.code == 0, result.err
    speeds = {
        name: float(value.replace(",", "")) for name, value in re.findall(r"^([abc]) +([\d,]+) i", result.out, re.M)
    }
    ratios = {name: float(value) for name, value in re.findall(r"^(b/[ac]) +([\d.]+)", result.out, re.M)}
    for name, ratio in ratios.items():
        own, other = speeds["b"], speeds[name[-1]]  # whole numbers, and few where the machine is busy
        assert (own - 0.5) / (other + 0.5) - 0.001 < ratio < (own + 0.5) / (other - 0.5) + 0.001
    assert set(ratios) == {"b/a", "b/c"}


def test_the_runs_take_turns(monkeypatch):
    turns, seen = [], []
    others = {name: iter(lambda name=name: seen.append(name), 0) for name in "ca"}
    monkeypatch.setattr(speed, "RUN_IN", 1)
    callback = speed.Turns(others, count=2, rounds=2)
    for step in range(2 * 3 + 1):
        callback.on_train_batch_start(SimpleNamespace(global_step=step), SimpleNamespace(device=CPU), None, step)
        turns.append("".join(seen))
        seen.clear()
    assert turns == ["cccaaa", "", "", "cccaaa", "", "", ""]
    assert {name: len(each) for name, each in callback.seconds.items()} == {"a": 2, "b": 2, "c": 2}
    assert all(seconds > 0 for each in callback.seconds.values() for seconds in each)


def test_the_time_to_a_score_is_that_of_whole_runs(run_main):
    result = run_main("--time-to", 30, "data=digits", "trainer.max_steps=30", "--seeds", 2, "seed=3", main=main)
    assert result.code == 0, result.err
    *own, other = (float(seconds) for seconds in re.findall(r"([\d.]+) s$", result.out, re.M))
    assert float(re.search(r"^c  seed 3  ([\d.]+) %", result.out, re.M)[1]) >= 30
    accuracies = [float(percent) for percent in re.findall(r"^b  seed [34]  ([\d.]+) %", result.out, re.M)]
    assert len(own) == len(accuracies) == 2
    mean = float(re.search(r"^b    ([\d.]+) ± [\d.]+ %", result.out, re.M)[1])
    assert mean == pytest.approx(sum(accuracies) / 2, abs=0.011)
    ratio = float(re.search(r"^c/b +([\d.]+)", result.out, re.M)[1])
    assert ratio == pytest.approx(other / sum(own) * 2, abs=0.1 + 0.2 / sum(own))


def test_the_time_to_a_score_has_the_teacher_in_it(run_main, tmp_path, small_weights):
    pytest.importorskip("src.teachers", reason="the teachers are deleted")
    reinforce = (
        f"{{_target_:src.distillation.soft_labels.SoftLabels,teachers:[{small_weights}],folder:{tmp_path / 'answers'}}}"
    )
    short = "data=digits", f"+data.soft_labels={reinforce}", "trainer.max_steps=3", "--seeds", 2
    result = run_main("--time-to", 1, *short, "experiment=fast", "task.distill_weight=0", main=main)
    assert result.code == 0, result.err
    found = re.findall(
        r"^b  seed [01]  .*, ([\d.]+) s, ([\d.]+) s of them for the teacher's answers$", result.out, re.M
    )
    assert len(found) == 2 and all(0 < float(asked) < float(whole) for whole, asked in found)
    assert result.err.count("asking the teacher about epoch 1") == 2 and not (tmp_path / "answers").exists()
    ratios = [float(re.search(rf"^{name}  ([\d.]+)", result.out, re.M)[1]) for name in ("c/b", "c/b, answers at hand")]
    assert ratios[0] < ratios[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("modle=cnn",), "did you mean"),
        (("--rounds", 0), "--rounds"),
        (("seed=abc",), "a whole number"),
        (("experiment=record",), "data=mnist"),
    ],
)
def test_a_mistake_is_one_line(run_main, arguments, words):
    result = run_main(*arguments, main=main)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1


def test_side_by_side_adds_up_what_runs_at_once_have(monkeypatch, run_main):
    class Run:
        """Writes at its end what a run beside so many others would."""

        begun = ended = 0

        def __init__(self, command, env, stdout):
            Run.begun += 1
            folder = Path(command[-1].removeprefix("hydra.run.dir="))
            folder.mkdir()
            self.file, self.crowded = folder / "metrics.json", 10 if "OMP_NUM_THREADS" in env else 60

        def wait(self):
            self.file.write_text(json.dumps({"samples_per_second": 100 if Run.begun == 1 else self.crowded}))
            Run.ended += 1
            if Run.ended == Run.begun:
                Run.begun = Run.ended = 0
            return 0

    monkeypatch.setattr(speed.subprocess, "Popen", Run)
    result = run_main("--side-by-side", "--rounds", 1, main=main)
    rows = re.findall(r"^(\d) at once, (\w+).*? (\d+) images/s +([\d.]+)", result.out, re.M)
    assert rows == [
        *(("1", "divided", "100", "1.00"), ("2", "divided", "120", "1.20")),
        *(("1", "1", "100", "1.00"), ("2", "1", "20", "0.20")),
    ]
