"""docs/own.md, followed to the letter in a copy of the project: its files are written, its commands are run."""

import ast
import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from src.core.config import ROOT

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/own.md").read_text()
# Overrides for commands that only have to work, not to learn.
SHORT = (
    *("trainer.max_epochs=1", "trainer.limit_train_batches=10", "trainer.accelerator=cpu"),
    "callbacks.tensorboard=null",
)
# Run programs one after another in one process, which imports PyTorch once.
DRIVER = """
import importlib, io, json, sys, tempfile
from contextlib import redirect_stderr, redirect_stdout

results = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = importlib.import_module(module).main() or 0
        except SystemExit as stop:
            code = stop.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str


def read_section(heading: str) -> str:
    (text,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return text


def read_files(text: str) -> dict[str, str]:
    """Return the code blocks that follow a line with a file name alone, by that name."""
    return dict(re.findall(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", text, re.M | re.S))


def read_commands(text: str) -> list[tuple[str, str]]:
    """Return each command with the error message that the page prints below it, if any."""
    commands: list[tuple[str, str]] = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        for line in block.splitlines() if language in ("", "bash") else ():
            if line.startswith("error: "):
                commands[-1] = commands[-1][0], line
            else:
                commands.append((line.removeprefix("$ "), ""))
    return commands


class ProjectCopy:
    """A copy of the project in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "conf", "tests", "docs", "weights"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder / name)

    def write(self, contents: dict[str, str]) -> None:
        for name, content in contents.items():
            assert not (self.folder / name).exists(), f"{name} is in the project"
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_text(content)

    def run(self, *commands: str, before: str = "") -> list[Result]:
        """Run `python -m MODULE ARGUMENTS` commands in one process, after the statement `before`."""
        programs = []
        for command in commands:
            python, flag, *words = shlex.split(command)
            assert (python, flag) == ("python", "-m") and re.match(r"(src|lab)\.", words[0])
            programs.append(words)
        stdout = self.run_python("-c", f"{before}\n{DRIVER}", json.dumps(programs))
        return [Result(*result) for result in json.loads(stdout.splitlines()[-1])]

    def run_python(self, *arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def run_shell(self, command: str) -> str:
        done = subprocess.run(["bash", "-ec", command], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def read_metrics(self, folder: str) -> dict[str, Any]:
        return json.loads((self.folder / folder / "metrics.json").read_text())


def add(command: str, folder: str, *overrides: str) -> str:
    """Return the command with the overrides and the run folder."""
    return shlex.join([*shlex.split(command), *overrides, f"hydra.run.dir={folder}"])


@pytest.fixture
def project(tmp_path) -> ProjectCopy:
    (tmp_path / "project").mkdir()
    return ProjectCopy(tmp_path / "project")


@pytest.fixture
def pets(project) -> None:
    rng = np.random.default_rng(0)
    for name in "cat", "dog":
        (project.folder / "pets" / name).mkdir(parents=True)
        for i in range(220):
            image = Image.fromarray(rng.integers(256, size=(10, 12, 3), dtype=np.uint8))
            image.save(project.folder / f"pets/{name}/{i}.png")


def write_npz(file: Path) -> None:
    rng = np.random.default_rng(0)
    shapes = {"train_images": (400, 16, 16), "test_images": (40, 16, 16)}
    images = {name: rng.integers(256, size=shape, dtype=np.uint8) for name, shape in shapes.items()}
    np.savez(file, **images, train_labels=np.arange(400) % 4, test_labels=np.arange(40) % 4)


def write_cifar10(root: Path) -> None:
    """Write files in CIFAR-10's format with 80 images each instead of 10,000."""
    rng, folder = np.random.default_rng(0), root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        images = rng.integers(256, size=(80, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [i % 10 for i in range(80)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_own_data_trains_by_one_command(project, pets):
    text = read_section("Data")
    project.write(read_files(text))
    write_npz(project.folder / "mine.npz")
    write_cifar10(project.folder / "data")
    commands = [
        add(command, f"run{n}", *SHORT, "data.batch_size=16") for n, (command, _) in enumerate(read_commands(text))
    ]
    skip_checksums = "from torchvision.datasets import cifar; cifar.check_integrity = lambda *_: True"
    results = project.run(*commands, "python -m src.evaluate run0 --output=scores", before=skip_checksums)
    assert [result.code for result in results] == [0] * 5, [result.err for result in results]
    metrics = [project.read_metrics(f"run{n}") for n in range(4)]
    assert [run["data"] for run in metrics] == ["pets", "pets", "mine", "cifar10"]
    assert [run["name"] for run in metrics] == ["pets", "pets", "mine", "cifar10"]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]  # in memory, and read by worker processes
    assert len({run["parameters"] for run in metrics}) == 3  # channels, sizes and classes are the data's

    spec = torch.load(project.folder / "run3/checkpoints/last.ckpt", weights_only=True)["ImageDataModule"]
    assert spec["shape"] == [3, 32, 32] and spec["classes"] == list("abcdefghij") and spec["preprocess"] == "resize"
    assert spec["mean"] == pytest.approx([0.5] * 3, abs=0.01) and spec["std"] == pytest.approx([0.29] * 3, abs=0.01)


def test_own_network_trains_and_a_package_must_be_allowed(project, pets):
    text = read_section("Network")
    files = read_files(text)
    project.write(files)
    target, allowed = re.findall(r"`_target_: (mypackage[\w.]+)`", text)[0], "allowed_packages: [mypackage]"
    assert f"`{allowed}`" in text
    project.write({"mypackage/nets.py": files["src/models/tiny.py"].replace("Tiny", "Net")})
    project.write({"conf/model/net.yaml": files["conf/model/tiny.yaml"].replace("src.models.tiny.Tiny", target)})
    tiny, invalid, resnet = read_commands(text)
    own = add("python -m src.train model=net data=digits", "own", *SHORT)
    results = project.run(
        *(add(tiny[0], "tiny", *SHORT), invalid[0], add(resnet[0], "resnet", *SHORT), own),
        "python -m src.predict tests/images/5.jpg --json --weights tiny",
    )
    assert [result.code for result in results] == [0, 2, 0, 2, 0], [result.err for result in results]
    assert project.read_metrics("tiny")["parameters"] == 64 * 785 + 10 * 65
    assert {"train/loss", "val/acc", "test/acc"} <= project.read_metrics("tiny")["metrics"].keys()
    assert results[1].err == f"{invalid[1]}\n"
    assert project.read_metrics("resnet")["parameters"] == 11_176_512 + 2 * 513
    assert f"_target_={target}" in results[3].err and "allowed_packages in conf/train.yaml" in results[3].err
    assert json.loads(results[4].out)[0]["digit"] in range(10)

    root = project.folder / "conf/train.yaml"
    root.write_text(root.read_text().replace("allowed_packages: []", allowed))
    results = project.run(own, "python -m src.predict tests/images/5.jpg --weights own")
    assert [result.code for result in results] == [0, 0], [result.err for result in results]
    assert project.read_metrics("own")["parameters"] == 32 * 785 + 10 * 33


# Stop the first run before a batch in the middle of the second epoch.
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


def test_own_task_is_ranked_by_its_metric_and_resumes(project):
    text = read_section("Task")
    project.write({**read_files(text), "src/training/stop.py": STOP})
    single, sweep, tune = (command for command, _ in read_commands(text))
    fast = "callbacks.tensorboard=null", "trainer.accelerator=cpu"
    stopped = *fast, "trainer.max_epochs=2", "+callbacks.stop._target_=src.training.stop.Stop"
    run, swept, tuned, cut, resumed = project.run(
        add(single, "run", *fast),
        shlex.join([*shlex.split(sweep), *fast, "trainer.max_epochs=1", "hydra.sweep.dir=swept"]),
        add(tune, "tuned", *fast, "trainer.max_epochs=1"),
        add(single, "cut", *stopped),
        "python -m src.train resume=cut",
    )
    assert [x.code for x in (run, swept, tuned, cut, resumed)] == [0, 0, 0, 143, 0], [run.err, swept.err, tuned.err]
    metrics = project.read_metrics("run")
    assert metrics["name"] == "regression" and metrics["parameters"] == 2 and metrics["epochs"] == 5
    assert metrics["metrics"]["val/rmse"] < 0.1 and "test/rmse" not in metrics["metrics"]
    best = torch.load(project.folder / "run/checkpoints/best.ckpt", weights_only=True)
    assert best["epoch"] + 1 == metrics["best_epoch"]

    scores = {file.parent.name: file for file in (project.folder / "swept").glob("*/metrics.json")}
    scores = {name: json.loads(file.read_text())["metrics"]["val/rmse"] for name, file in scores.items()}
    assert len(scores) == 2 and min(scores, key=scores.get) in swept.out.rpartition("Best")[2]
    assert len(list(project.folder.glob("tuned/*/metrics.json"))) == 3
    assert "drawn anew" in resumed.err

    if pytest.importorskip("torchdata"):
        (line,) = re.findall(r"`(from torchdata.*)`", text)
        file = project.folder / "src/data/line.py"
        file.write_text(file.read_text().replace("import DataLoader, TensorDataset", f"import TensorDataset\n{line}"))
        (project.folder / "stopped").unlink()
        resumed = project.run(
            add(single, "cut2", *stopped), add(single, "whole", *stopped), "python -m src.train resume=cut2"
        )
        assert [x.code for x in resumed] == [143, 0, 0] and "drawn anew" not in resumed[2].err
        assert project.read_metrics("cut2")["metrics"] == project.read_metrics("whole")["metrics"]


def test_own_option_and_callback_take_effect(project):
    text = read_section("Option") + read_section("Callback")
    project.write(read_files(text))
    option, callback = (command for command, _ in read_commands(text))
    option = add(option, "option", *SHORT, "trainer.max_epochs=2", "trainer.log_every_n_steps=1")
    results = project.run(option, add(callback, "callback", *SHORT))
    assert [result.code for result in results] == [0, 0], [result.err for result in results]
    assert project.read_metrics("option")["metrics"]["lr"] == pytest.approx(0.0005)  # halved after the first epoch
    assert list((project.folder / "option").glob("events*")) and (project.folder / "option/metrics.csv").is_file()
    state = torch.load(project.folder / "option/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]
    assert "square_avg" in state["state"][0] and state["param_groups"][0]["alpha"] == 0.99
    assert "goodbye after step 10" in results[1].out.splitlines()


def test_notebook_code_predicts_test_images(project):
    (code,) = re.findall(r"```python\n(.*?)```", read_section("In a notebook"), re.S)
    check = "print(float((log_probabilities.argmax(1) == data.splits.test.labels.cpu()).float().mean()))"
    lines = project.run_python("-c", f"import warnings; warnings.simplefilter('ignore')\n{code}{check}").splitlines()
    assert lines[0] == "5" and float(lines[-1]) > 0.5


def test_renamed_package_trains_and_predicts(project):
    ((command, _),) = read_commands(read_section("Rename the package"))
    old, new = re.findall(r"git mv (\w+) (\w+)", command)[0]
    if old == new:
        pytest.skip("the package has been renamed")
    commit = "git -c user.name=a -c user.email=a@b.c commit -q -m all"
    project.run_shell(f"git init -q && git add -A && {commit} && {command}")
    assert not project.run_shell(rf"git grep -hIwP '(?<![\w.]){old}' || true")
    assert not (project.folder / old).exists()
    results = project.run(
        add(f"python -m {new}.train data=digits", "run", *SHORT),
        f"python -m {new}.predict tests/images/5.jpg --weights run",
        f"python -m {new}.predict tests/images/5.jpg --json",
    )
    assert [result.code for result in results] == [0, 0, 0], [result.err for result in results]
    assert json.loads(results[2].out)[0]["digit"] == 5  # by the shipped weights


def find_missing_modules(folder: Path) -> set[str]:
    """Return the imports and `_target_`s of modules of the project that do not exist."""
    names = set()
    for file in [*folder.glob("src/**/*.py"), *folder.glob("tests/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names if node.module == "src")}
    for file in folder.glob("conf/**/*.yaml"):
        names |= {target.rpartition(".")[0] for target in re.findall(r"_target_: (src\.[\w.]+)", file.read_text())}
    paths = {
        name: folder.joinpath(*name.split(".")) for name in names if name.startswith("src.") and name != "src.load"
    }
    return {name for name, path in paths.items() if not path.with_suffix(".py").exists() and not path.is_dir()}


def test_deleted_parts_are_not_missed(project):
    commands = [command for command, _ in read_commands(read_section("What may be deleted"))]
    assert len(commands) == 4 and all(command.startswith("rm -r ") for command in commands)
    for command in commands:  # each part by itself
        project.run_shell(f"cp -r . ../part && cd ../part && {command}")
        assert not find_missing_modules(project.folder.parent / "part"), command
        shutil.rmtree(project.folder.parent / "part")
    project.run_shell("\n".join(commands))
    chosen = "test_every_config_composes", "--ignore=tests/docs"
    out = project.run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", "-m", "not slurm", "-k", *chosen)
    assert " passed" in out
