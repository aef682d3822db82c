"""What a person sees of a run, of a sweep, of a mistake, and of --help."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from omegaconf import OmegaConf
from torchvision import datasets

from src import train, tune
from src.cli.hydra_main import parse_arguments
from src.core.config import CONF, ROOT, ROOT_KEYS
from src.core.errors import UserError
from src.data.datasets import MNIST, TorchvisionDataset

TINY = (
    "data=digits",
    "model.channels=[4,4,4,4,4,4]",
    "trainer.accelerator=cpu",
    "trainer.limit_train_batches=8",
    "trainer.max_epochs=2",
    "callbacks.tensorboard=null",
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(run_main, monkeypatch):
    """Runs a main with a terminal for its output; gives the lines that stay on it."""

    def run(*arguments: object, main=train.main, columns: int = 80) -> list[str]:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        for name, value in ("TERM", "xterm"), ("COLUMNS", str(columns)), ("LINES", "50"):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("rich._console", None)  # the one of a test before has its width
        run_main(*arguments, main=main)
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
    assert doors == ["src.evaluate", "src.draw", "src.dashboard"]


def test_a_sweep_on_a_terminal_has_a_line_a_job(terminal, tmp_path):
    lines = terminal("-m", *TINY, "optimizer.lr=0.1,0.2", f"hydra.sweep.dir={tmp_path / 'sweep'}", columns=45)
    told = [line for line in lines if re.match(r"\d of 2  lr=0.\d  \d+.\d\d %  best \d+.\d\d %", line)]
    assert [line[0] for line in told] == ["1", "2"]
    assert sum("Layer (type" in line for line in lines) == 1
    assert not any(line.startswith(("epoch", "next")) for line in lines)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--lr=0.1"], "did you mean optimizer.lr=0.1?"),
        (["--cfg", "jobs"], "invalid choice: 'jobs'"),
        (["optimizer.lr=0.1,0.2"], "several values are a run each with -m"),
        (["model.channels=[16,", "16]"], "a value with spaces needs quotes: 'model.channels=[16, 16]'"),
        (["+trainer.foo=1"], "trainer.foo: lightning.Trainer has no such argument"),
        (["+optimizer.momentun=1"], "did you mean optimizer.momentum?"),
        (["~optimizer.momentun"], "--help shows all keys"),
        (["model@net=cnn"], "did you mean model?"),
        (["optimizer.lr=[0.1"], "a bracket is open; close it"),
    ],
)
def test_a_first_mistake_is_one_line_that_names_the_fix(run_main, tmp_path, arguments, said):
    result = run_main(*TINY, *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and result.err.startswith("error: ") and said in result.err
    assert len(result.err.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["experiment=backprop", "model=cnn"], "experiment=backprop without model="),
        (["data=digits", "model=backprop"], "an experiment= that has both"),
        (["-m", "model=cnn,cn"], "model=cn: there is no such option; did you mean cnn?"),
    ],
)
def test_parts_that_do_not_fit_are_one_line_and_leave_nothing(run_main, tmp_path, arguments, said):
    result = run_main(*arguments, f"hydra.run.dir={tmp_path / 'run'}", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and said in result.err
    assert not list(tmp_path.iterdir())


def test_a_sweep_that_cannot_begin_takes_nothing_that_was_there(run_main, tmp_path):
    (tmp_path / "mine").mkdir()
    assert run_main("-m", "model=cnn,cn", f"hydra.sweep.dir={tmp_path}").code == 2
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_study_is_not_in_a_sweeps_folder(run_main, tmp_path):
    places = f"hydra.run.dir={tmp_path / 'study'}", f"hydra.sweep.dir={tmp_path / 'sweep'}"
    result = run_main(*places, main=tune.main)
    assert result.code == 2 and "hydra.run.dir" in result.err and not list(tmp_path.iterdir())


def test_an_empty_variable_is_named(run_main, monkeypatch):
    monkeypatch.setenv("MNIST_ROOT", "")
    assert "MNIST_ROOT is empty" in run_main().err


@pytest.mark.parametrize(
    "key", ["optimizer.rl=1", "data=digits optimizer.rl=1", "+optimizer.ls=1", "-m +optimizer.ls=1,2"]
)
def test_a_mistyped_key_takes_one_composition(run_main, monkeypatch, key):
    composed, compose = [], ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(
        ConfigLoaderImpl, "load_configuration", lambda *given, **more: composed.append(1) or compose(*given, **more)
    )
    assert "did you mean optimizer.lr?" in run_main(*key.split()).err and len(composed) == 1


def test_overrides_may_stand_on_both_sides_of_a_flag():
    assert parse_arguments(["seed=1", "-m", "data=digits"], "train") == ["-m", "seed=1", "data=digits"]


@pytest.mark.parametrize(
    "start, fix",
    [
        (["-S", "-m", "src.train"], "make train brings them"),  # without site-packages
        (["-S", "src/train.py"], "python -m src.train"),
        (["-S", "src/tune.py"], "python -m src.tune"),
        (["src/predict.py", "x.png"], "python -m src.predict"),
    ],
)
def test_a_start_that_cannot_work_says_how_it_does(start, fix):
    found = subprocess.run([sys.executable, *start], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2 and len(found.stderr.splitlines()) == 1 and fix in found.stderr


def test_what_cannot_be_fetched_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets.KMNIST, "mirrors", ["http://127.0.0.1:9/"])
    (tmp_path / "there").mkdir()
    for source in MNIST(), TorchvisionDataset("KMNIST"):
        for root in tmp_path / "not/there", tmp_path / "there":
            with pytest.raises(UserError, match="could not be downloaded"):
                source.download(root)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_help_is_made_of_the_configs(run_main, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = run_main("--help")
    assert result.code == 0 and max(map(len, result.out.splitlines())) <= 80
    for experiment in (CONF / "experiment").glob("*.yaml"):
        assert re.search(rf"^{experiment.stem}  +\S", result.out, re.M)
    for key in ROOT_KEYS.keys() & OmegaConf.load(CONF / "train.yaml").keys():
        assert re.search(rf"^{key}=", result.out, re.M)
    assert re.search(r"^seed=0 +weights, order", result.out, re.M) and "*sgd" in result.out
    assert "n_trials=20" in run_main("--help", main=tune.main).out
    group = run_main("--help", "optimizer", "optimizer=muon").out
    assert re.search(r"^sgd  +Stochastic", group, re.M) and "optimizer.lr=0.1 " in group and "(a number above" in group
    assert re.search(r"^optimizer.sgd_lr_ratio=0.2 +learning rate of all but", group, re.M)
    assert "trainer.max_epochs=5" in run_main("-h", "max_epochs").out
    mistaken = run_main("--help", "optimzer")
    assert mistaken.code == 2 and "did you mean optimizer?" in mistaken.err


@pytest.mark.parametrize("shell", [["bash", "--norc", "-i"], ["zsh", "-f", "-i"]], ids=["bash", "zsh"])
def test_a_tab_completes(shell):
    if not shutil.which(shell[0]):
        pytest.skip(f"there is no {shell[0]}")
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        os.environ["TERM"] = "dumb"
        os.execvp(shell[0], shell)
    shown = ""

    def until(text: str) -> None:
        nonlocal shown
        shown = ""
        while text not in shown:
            assert select.select([terminal], [], [], 60)[0], shown
            shown += os.read(terminal, 65536).decode()

    try:
        os.write(terminal, b"source src/cli/completion.sh; echo read''y\n")
        until("ready\r\n")
        os.write(terminal, f"{sys.executable} -m src.train optimizer.mom\t".encode())
        until("optimizer.momentum=")
        os.write(terminal, b"\x15" + f"{sys.executable} -m src.train optimizer=ad\t".encode())
        until("optimizer=adamw")
    finally:
        os.kill(process, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(process, 0)
