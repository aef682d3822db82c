import re

import pytest

from src import benchmark

TINY = "data=digits", "model.channels=[4,4,4,4,4,4]", "--batches", 2, "--rounds", 1


def test_the_ratios_are_those_of_the_speeds(program):
    result = program(*TINY, main=benchmark.main)
    assert result.code == 0, result.err
    speeds = {
        name: float(value.replace(",", "")) for name, value in re.findall(r"^([abc]) +([\d,]+) i", result.out, re.M)
    }
    ratios = {name: float(value) for name, value in re.findall(r"^(b/[ac]) +([\d.]+)", result.out, re.M)}
    for name, ratio in ratios.items():
        assert ratio == pytest.approx(speeds["b"] / speeds[name[-1]], rel=0.01)
    assert set(ratios) == {"b/a", "b/c"}


def test_the_time_to_a_score_is_that_of_whole_runs(program):
    result = program("--time-to", 30, "data.dataset=digits", "trainer.max_steps=30", "--rounds", 1, main=benchmark.main)
    assert result.code == 0, result.err
    own, other = (float(seconds) for seconds in re.findall(r"([\d.]+) s$", result.out, re.M))
    accuracy = float(re.search(r"^c  seed 0  ([\d.]+) %", result.out, re.M)[1])
    assert accuracy >= 30
    assert (
        re.search(r"^b  seed 0  ([\d.]+) %", result.out, re.M)[1]
        == re.search(r"^b    ([\d.]+) % on", result.out, re.M)[1]
    )
    assert float(re.search(r"^c/b +([\d.]+)", result.out, re.M)[1]) == pytest.approx(other / own, abs=0.1 + 0.1 / own)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("data=digits", "--batches", 500), "use a smaller number"),
        (("modle=cnn",), "did you mean"),
        (("--rounds", 0), "--rounds"),
        (("seed=abc",), "a whole number"),
        (("experiment=record",), "data=mnist"),
    ],
)
def test_a_mistake_is_one_line(program, arguments, words):
    result = program(*arguments, main=benchmark.main)
    assert result.code == 2 and words in result.err and len(result.err.splitlines()) == 1
