"""docs/own.md, followed to the letter in a copy of the project: its files are written, its commands are run."""

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from src.core.config import ROOT
from src.core.errors import format_metric

PAGE = (ROOT / "docs/own.md").read_text()
# What a step needs a second for: a command that only has to work is told to do less.
SHORT = (
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=10",
    "trainer.accelerator=cpu",
    "callbacks.tensorboard=null",
)
AS_MODULE = "import runpy, sys; runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"


def section(heading: str) -> str:
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return text


def files(text: str) -> dict[str, str]:
    """The contents by file name: a block below a line that is a name alone."""
    return dict(re.findall(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", text, re.M | re.S))


def commands(text: str) -> list[tuple[str, str]]:
    """Each command with what it prints to stderr, where the page says so."""
    lines = "".join(re.findall(r"^```(?:bash)?\n((?:\$ |[^`]).*?)^```$", text, re.M | re.S)).splitlines()
    found: list[tuple[str, str]] = []
    for line in lines:
        if line.startswith("error: "):
            found[-1] = found[-1][0], line
        else:
            found.append((line.removeprefix("$ "), ""))
    return found


class Done(NamedTuple):
    code: int
    out: str
    err: str
    metrics: dict


class Copy:
    """A copy of the project, and what is done in it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        for name in ("src", "conf", "tests", "docs", "weights"):
            shutil.copytree(ROOT / name, folder / name)
        for name in ("Makefile", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder / name)

    def write(self, written: dict[str, str]) -> None:
        for name, content in written.items():
            assert not (self.folder / name).exists(), f"{name} is in the project"
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(content)

    def run(self, command: str, *further: str, before: str = "") -> Done:
        """`python -m MODULE ARGUMENTS` with further ones; of a training, what its metrics.json says."""
        python, flag, module, *arguments = shlex.split(command, comments=True)
        assert (python, flag) == ("python", "-m") and module.startswith(("src.", "lab.", "pytest"))
        self.runs += 1
        run = self.folder / f"run{self.runs}"
        alone = module == "src.train" and "-m" not in arguments and not arguments[0].startswith("resume=")
        arguments += [*further, f"hydra.run.dir={run}"] if alone else further
        done = self.python(*(("-c", f"{before}; {AS_MODULE}") if before else ("-m",)), module, *arguments)
        metrics = json.loads((run / "metrics.json").read_text()) if (run / "metrics.json").is_file() else {}
        return Done(done.returncode, done.stdout, done.stderr, metrics)

    def python(self, *arguments: str) -> subprocess.CompletedProcess:
        piped = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
        return subprocess.run([sys.executable, *arguments], cwd=self.folder, **piped)

    def pytest(self, chosen: str) -> None:
        """Imports all tests, and runs the chosen ones."""
        quick = "not slow and not mnist and not gpu"
        done = self.run(f"python -m pytest -q -p no:cacheprovider -m '{quick}' -k '{chosen}'")
        assert done.code == 0 and " passed" in done.out, done.out[-3000:] + done.err[-3000:]

    def shell(self, command: str) -> SimpleNamespace:
        done = subprocess.run(["bash", "-ec", command], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done


@pytest.fixture
def copy(tmp_path) -> Copy:
    (tmp_path / "project").mkdir()
    return Copy(tmp_path / "project")


@pytest.fixture
def pictures(copy) -> None:
    rng = np.random.default_rng(0)
    for kind in "cat", "dog":
        (copy.folder / "pictures" / kind).mkdir(parents=True)
        for i in range(220):
            picture = Image.fromarray(rng.integers(256, size=(10, 12, 3), dtype=np.uint8))
            picture.save(copy.folder / f"pictures/{kind}/{i}.png")


def npz(file: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {"train_images": (400, 16, 16), "test_images": (40, 16, 16)}
    images = {name: rng.integers(256, size=shape, dtype=np.uint8) for name, shape in arrays.items()}
    np.savez(file, **images, train_labels=np.arange(400) % 4, test_labels=np.arange(40) % 4)


def cifar10(root: Path) -> None:
    """Its files, with 80 images each where they have 10,000."""
    rng, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        images = rng.integers(256, size=(80, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [i % 10 for i in range(80)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_data_of_any_kind_is_chosen_by_one_command(copy, pictures):
    text = section("Data")
    assert len(files(text)["conf/data/cifar10.yaml"].splitlines()) <= 10
    copy.write(files(text))
    npz(copy.folder / "mine.npz")
    cifar10(copy.folder / "data")
    unverified = "from torchvision.datasets import cifar; cifar.check_integrity = lambda *_: True"
    found = [copy.run(command, *SHORT, "data.batch_size=16", before=unverified) for command, _ in commands(text)]
    assert [run.code for run in found] == [0] * 4, [run.err for run in found]
    assert [run.metrics["data"] for run in found] == ["pictures", "pictures", "mine", "cifar10"]
    assert [run.metrics["name"] for run in found] == ["pets", "pets", "mine", "cifar10"]
    assert found[0].metrics["metrics"] == found[1].metrics["metrics"]  # in memory, and read by four processes
    assert len({run.metrics["parameters"] for run in found}) == 3  # colours, sizes and classes are the data's

    spec = torch.load(copy.folder / "run4/checkpoints/last.ckpt", weights_only=True)["ImageData"]
    assert spec["shape"] == [3, 32, 32] and spec["classes"] == list("abcdefghij") and spec["preprocess"] == "resize"
    assert spec["mean"] == pytest.approx([0.5] * 3, abs=0.01) and spec["std"] == pytest.approx([0.29] * 3, abs=0.01)
    read = copy.run("python -m src.evaluate", str(copy.folder / "run1"), "--output=scores")
    assert read.code == 0, read.err


def test_a_network_of_ones_own_is_a_module_and_a_config(copy, pictures):
    text = section("Network")
    copy.write(files(text))
    resnet, tiny, refused = commands(text)
    done = copy.run(resnet[0], *SHORT)
    assert done.code == 0, done.err
    assert done.metrics["data"] == "pictures" and done.metrics["parameters"] == 11_176_512 + 2 * 513

    done = copy.run(tiny[0], *SHORT[:-1])
    assert done.code == 0 and not done.err, done.err
    assert done.metrics["data"] == "digits" and done.metrics["parameters"] == 64 * 785 + 10 * 65
    assert {"train/loss", "val/acc", "test/acc"} <= done.metrics["metrics"].keys()
    read = copy.run("python -m src.predict tests/images/5.jpg --json --weights", str(copy.folder / "run2"))
    assert read.code == 0 and json.loads(read.out)[0]["digit"] in range(10), read.err

    done = copy.run(refused[0])
    assert done.code == 2 and done.err == f"{refused[1]}\n"


def test_a_package_of_ones_own_has_to_be_allowed(copy):
    written = files(section("Network"))
    target, allowed = re.findall(r"`_target_: ([\w.]+)`", section("Network"))[0], "allowed: [mypackage]"
    assert f"`{allowed}`" in section("Network")
    copy.write({"mypackage/nets.py": written["src/models/tiny.py"].replace("Tiny", "Net")})
    copy.write({"conf/model/mine.yaml": written["conf/model/tiny.yaml"].replace("src.models.tiny.Tiny", target)})
    command = "python -m src.train model=mine data=digits", *SHORT
    done = copy.run(*command)
    assert done.code == 2 and len(done.err.splitlines()) == 1
    assert f"_target_={target}: not a class" in done.err and "allowed: in conf/train.yaml" in done.err
    root = copy.folder / "conf/train.yaml"
    root.write_text(root.read_text().replace("allowed: []", allowed))
    done = copy.run(*command)
    assert done.code == 0 and done.metrics["parameters"] == 32 * 785 + 10 * 33, done.err
    assert copy.run("python -m src.predict tests/images/5.jpg --weights", str(copy.folder / "run2")).code == 0


@pytest.fixture
def regression(copy) -> Copy:
    copy.write(files(section("Task")))
    return copy


def test_a_task_of_ones_own_is_chosen_by_its_metric(regression):
    run, sweep, tune = (command for command, _ in commands(section("Task")))
    done = regression.run(run, "callbacks.tensorboard=null")
    assert done.code == 0 and not done.err, done.err
    assert done.metrics["name"] == "regression" and done.metrics["data"] == "Line"
    assert done.metrics["parameters"] == 2 and done.metrics["epochs"] == 5
    assert done.metrics["metrics"]["val/rmse"] < 0.1 and "test/rmse" not in done.metrics["metrics"]
    checkpoint = torch.load(regression.folder / "run1/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["epoch"] + 1 == done.metrics["best_epoch"]
    (best,) = [state for name, state in checkpoint["callbacks"].items() if "val/rmse" in name]
    assert best["best_model_score"].item() <= done.metrics["metrics"]["val/rmse"]

    done = regression.run(sweep, "trainer.max_epochs=1", "callbacks.tensorboard=null", "hydra.sweep.dir=swept")
    assert done.code == 0, done.err
    scores = {}
    for file in (regression.folder / "swept").glob("*/metrics.json"):
        scores[file.parent.name] = json.loads(file.read_text())["metrics"]["val/rmse"]
    assert len(scores) == 2 and f"{min(scores, key=scores.get)}: val/rmse" in done.out.partition("Best:")[2]

    done = regression.run(tune, "trainer.max_epochs=1", "callbacks.tensorboard=null", "hydra.run.dir=tuned")
    assert done.code == 0, done.err
    found = [json.loads(file.read_text())["metrics"]["val/rmse"] for file in regression.folder.glob("tuned/*/metr*")]
    assert len(found) == 3 and f"best {format_metric('val/rmse', min(found))}" in done.out


# Ends the run once, before a batch in the middle of the second epoch.
STOP = """
import os
import signal
from pathlib import Path

from lightning.pytorch.callbacks import Callback


class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == 11 and not Path("stopped").exists():
            Path("stopped").touch()
            os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize("stateful", [False, True])
def test_a_stopped_task_says_whether_it_goes_on_to_the_same_bits(regression, stateful):
    if stateful:
        pytest.importorskip("torchdata")
        (line,) = re.findall(r"`(from torchdata.*)`", section("Task"))
        file = regression.folder / "src/data/line.py"
        plain = file.read_text()
        file.write_text(plain.replace("import DataLoader, TensorDataset", f"import TensorDataset\n{line}"))
        assert file.read_text() != plain
    regression.write({"src/stop.py": STOP})
    short = "callbacks.tensorboard=null", "trainer.max_epochs=2", "+callbacks.stop._target_=src.stop.Stop"
    command, _ = commands(section("Task"))[0]
    done = regression.run(command, *short)
    assert done.code == 143, done.err
    whole = regression.run(command, *short)
    assert whole.code == 0, whole.err
    done = regression.run(f"python -m src.train resume={regression.folder / 'run1'}")
    assert done.code == 0 and ("drawn anew" in done.err) != stateful, done.err
    runs = (json.loads((regression.folder / f"run{n}/metrics.json").read_text())["metrics"] for n in (1, 2))
    assert (next(runs) == next(runs)) == stateful


def test_an_option_of_ones_own_is_a_config(copy):
    text = section("Option")
    copy.write(files(text))
    both, callback = (command for command, _ in commands(text))
    done = copy.run(both, *SHORT, "trainer.max_epochs=2", "trainer.log_every_n_steps=1")
    assert done.code == 0, done.err
    assert done.metrics["metrics"]["lr"] == pytest.approx(0.0005)  # as it was in the second epoch
    assert list((copy.folder / "run1").glob("events*")) and (copy.folder / "run1/metrics.csv").is_file()
    state = torch.load(copy.folder / "run1/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert "square_avg" in state["state"][0] and state["param_groups"][0]["alpha"] == 0.99

    done = copy.run(callback, *SHORT)
    assert done.code == 0 and "goodbye after step 10" in done.out.splitlines(), done.err


def test_the_notebook_runs(copy):
    (code,) = re.findall(r"```python\n(.*?)```", section("In a notebook"), re.S)
    check = """
labels = torch.cat([labels for _, labels in data.predict_dataloader()])
print(float((log_probabilities.argmax(1) == labels).float().mean()))
"""
    done = copy.python("-c", f"import warnings; warnings.simplefilter('ignore')\n{code}{check}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "5" and float(lines[-1]) > 0.5


@pytest.mark.slow
def test_another_name_is_one_command(copy):
    ((command, _),) = commands(section("Name"))
    old, new = re.findall(r"git mv (\w+) (\w+)", command)[0]
    if old == new:
        pytest.skip("it has been renamed")
    git = "git -c user.name=a -c user.email=a@b.c"
    copy.shell(f"git init -q && git add -A && {git} commit -q -m all")
    copy.shell(command)
    assert not copy.shell(rf"git grep -hIwP '(?<![\w.]){old}' || true").stdout
    assert not (copy.folder / old).exists()
    done = copy.run(f"python -m {new}.train data=digits hydra.run.dir=run", *SHORT)
    assert done.code == 0, done.err
    assert json.loads((copy.folder / "run/metrics.json").read_text())["metrics"]["test/acc"] > 0
    assert copy.run(f"python -m {new}.predict tests/images/5.jpg --weights run").code == 0
    read = copy.run(f"python -m {new}.predict tests/images/5.jpg --json").out
    assert json.loads(read)[0]["digit"] == 5  # by the shipped weights
    some = "composes or pytorch or rule or network or file or pickle"
    copy.pytest(f"(test_train.py or test_weights.py) and ({some})")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2, 3, None], ids=["lesson", "page", "benchmark", "teachers", "all"])
def test_a_part_that_is_deleted_is_not_missed(copy, number):
    lines = [command for command, _ in commands(section("What may be deleted"))]
    assert len(lines) == 4 and all(line.startswith("rm -r ") for line in lines)
    for line in lines if number is None else [lines[number]]:
        copy.shell(line)
    some = "composes and (data or model or experiment)"
    copy.pytest(some if number is not None else f"{some} or rule_is_for or test_data.py or test_models.py")
