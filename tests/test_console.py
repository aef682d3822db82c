"""What a person sees of a run, of a sweep, of a mistake, and of --help."""

import io
import json
import re
import sys

import pytest

from src import train

TINY = (
    "data=digits",
    "model.channels=[4,4,4,4,4,4]",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=8",
    "trainer.max_epochs=2",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(program, monkeypatch):
    """Runs a main with a terminal of 80 columns for its output; gives the lines that stay on it."""

    def run(*arguments: object, main=train.main) -> list[str]:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        for name, value in ("TERM", "xterm"), ("COLUMNS", "80"), ("LINES", "50"):
            monkeypatch.setenv(name, value)
        program(*arguments, main=main)
        # A line that is erased later was a state of the bar.
        seen = re.sub(r"[^\n]*\n?(\r|\x1b\[1A|\x1b\[\?25h)*\x1b\[2K", "", screen.getvalue())
        return re.sub(r"\r|\x1b\[[?\d;]*[A-Za-z]", "", seen).splitlines()

    return run


def test_a_run_on_a_terminal(terminal, tmp_path):
    lines = terminal(*TINY, f"hydra.run.dir={tmp_path / 'run'}")
    scores = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert f"train acc {100 * scores['train/acc']:.2f} %" in epochs[1]  # of its own epoch, also the last
    assert f"val acc {100 * scores['val/acc']:.2f} %" in epochs[1]
    assert not any(re.search("━|left", line) for line in lines)  # the bar is gone
    wide = [line for line in lines if len(line) > 80 and str(tmp_path.name) not in line]
    assert not wide and not any("Units" in line for line in lines)
    doors = [line.split()[3] for line in lines if line.startswith("next    python")]
    assert doors == ["src.evaluate", "src.draw"]


def test_a_sweep_on_a_terminal_has_a_line_a_job(terminal, tmp_path):
    lines = terminal("-m", *TINY, "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    told = [line for line in lines if re.match(r"\d of 2  optimizer.lr=0.\d  \d+.\d\d %  best \d+.\d\d %", line)]
    assert [line[0] for line in told] == ["1", "2"]
    assert sum("Layer (type" in line for line in lines) == 1
    assert not any(line.startswith(("epoch", "next")) for line in lines)
