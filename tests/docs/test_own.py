"""docs/own.md, followed to the letter in a copy of the project: its files are written, its commands are run."""

import json
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

from src.core.config import ROOT

pytestmark = pytest.mark.slow
PAGE = (ROOT / "docs/own.md").read_text()
FAST = "++callbacks.tensorboard=null", "trainer.accelerator=cpu"
SHORT = *FAST, "trainer.max_epochs=1", "trainer.limit_train_batches=10"  # for runs that need not learn
# Run programs one after another in one process, which imports PyTorch once.
DRIVER = """
import importlib, io, json, sys
from contextlib import redirect_stderr, redirect_stdout

results = []
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [f"{module.replace('.', '/')}.py", *arguments]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            importlib.import_module(module).main()
        except SystemExit as stop:
            code = stop.code or 0
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
Result = namedtuple("Result", "code out err")


def read_section(heading: str) -> str:
    return re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[0]


def read_files(text: str) -> dict[str, str]:
    """Return the code blocks that follow a line with a file name alone, by that name."""
    return dict(re.findall(r"^`([\w./]+)`\n```\w+\n(.*?)^```$", text, re.M | re.S))


def read_commands(text: str) -> list[str]:
    """Return the lines of the blocks without a language and in bash; those after a $ if there are any."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [line.removeprefix("$ ") for name, block in blocks if name in ("", "bash") for line in block.splitlines()]


class ProjectCopy:
    """A copy of the project in a temporary folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("src", "conf", "tests", "docs", "weights"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("Makefile", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / name, folder / name)

    def write(self, contents: dict[str, str]) -> None:
        for file, content in ((self.folder / name, content) for name, content in contents.items()):
            assert not file.exists(), f"{file} is in the project"
            file.parent.mkdir(exist_ok=True)
            file.write_text(content)

    def replace(self, name: str, old: str, new: str) -> None:
        content = (self.folder / name).read_text()
        assert old in content
        (self.folder / name).write_text(content.replace(old, new))

    def run(self, *commands: str, codes: list[int], before: str = "") -> list[Result]:
        """Run `python -m MODULE ARGUMENTS` commands in one process; assert their exit codes."""
        programs = [shlex.split(command.removeprefix("python -m ")) for command in commands]
        stdout = self.execute(sys.executable, "-c", f"{before}\n{DRIVER}", json.dumps(programs))
        results = [Result(*result) for result in json.loads(stdout.splitlines()[-1])]
        assert [result.code for result in results] == codes, [result.err for result in results]
        return results

    def execute(self, program: str, *arguments: str) -> str:
        done = subprocess.run([program, *arguments], cwd=self.folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def read_metrics(self, run: str) -> dict[str, Any]:
        return json.loads((self.folder / run / "metrics.json").read_text())

    def load(self, run: str, name: str = "last") -> dict[str, Any]:
        return torch.load(self.folder / run / f"checkpoints/{name}.ckpt", weights_only=True)


def add(command: str, folder: str, *overrides: str) -> str:
    return shlex.join([*shlex.split(command), *overrides, f"hydra.run.dir={folder}"])


@pytest.fixture
def project(tmp_path) -> ProjectCopy:
    """The copy, with 220 images of noise for each of two classes in pets/."""
    (tmp_path / "project").mkdir()
    rng = np.random.default_rng(0)
    for name in "cat", "dog":
        (tmp_path / "project/pets" / name).mkdir(parents=True)
        for i in range(220):
            image = Image.fromarray(rng.integers(256, size=(10, 12, 3), dtype=np.uint8))
            image.save(tmp_path / f"project/pets/{name}/{i}.png")
    return ProjectCopy(tmp_path / "project")


def write_cifar10(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number, name in enumerate((*(f"data_batch_{n}" for n in range(1, 6)), "test_batch")):
        images = np.random.default_rng(number).integers(256, size=(80, 3 * 32 * 32), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": images, "labels": [i % 10 for i in range(80)]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_own_data_trains_by_one_command(project):
    project.write(read_files(text := read_section("Data")))
    arrays = {"images": np.zeros((400, 16, 16), np.uint8), "labels": np.arange(400) % 4}
    splits = {f"{split}_{name}": array for name, array in arrays.items() for split in ("train", "test")}
    np.savez(project.folder / "mine.npz", **splits)
    write_cifar10(project.folder / "data/cifar-10-batches-py")
    commands = [add(command, f"run{n}", *SHORT, "data.batch_size=16") for n, command in enumerate(read_commands(text))]
    skip_checksums = "from torchvision.datasets import cifar; cifar.check_integrity = lambda *_: True"
    project.run(*commands, "python -m src.evaluate run0 --output=scores", codes=[0] * 5, before=skip_checksums)
    metrics = [project.read_metrics(f"run{n}") for n in range(4)]
    assert [(run["data"], run["name"]) for run in metrics] == [(x, x) for x in ("pets", "pets", "mine", "cifar10")]
    assert metrics[0]["metrics"] == metrics[1]["metrics"]  # in memory, and read by worker processes
    assert len({run["parameters"] for run in metrics}) == 3  # channels, sizes and classes are the data's

    spec = project.load("run3")["ImageDataModule"]
    assert spec["shape"] == (3, 32, 32) and spec["classes"] == tuple("abcdefghij") and spec["preprocess"] == "resize"
    assert spec["mean"] == pytest.approx([0.5] * 3, abs=0.01) and spec["std"] == pytest.approx([0.29] * 3, abs=0.01)


def test_own_network_trains_and_a_package_must_be_allowed(project):
    text = read_section("Network")
    files = read_files(text)
    target, (allowed,) = "mypackage.nets.Net", re.findall(r"`(allowed_packages: .*mypackage.*)`", PAGE)
    project.write({**files, "mypackage/nets.py": files["src/models/tiny.py"].replace("Tiny", "Net")})
    project.write({"conf/model/net.yaml": files["conf/model/tiny.yaml"].replace("src.models.tiny.Tiny", target)})
    tiny, invalid, message, resnet = read_commands(text)
    own = add("python -m src.train model=net data=digits", "own", *SHORT)
    predict = "python -m src.predict tests/images/5.jpg --json --weights"
    commands = add(tiny, "tiny", *SHORT), invalid, add(resnet, "resnet", *SHORT), own, f"{predict} tiny"
    results = project.run(*commands, codes=[0, 2, 0, 2, 0])
    assert project.read_metrics("tiny")["parameters"] == 64 * 785 + 10 * 65
    assert {"train/loss", "val/acc", "test/acc"} <= project.read_metrics("tiny")["metrics"].keys()
    assert results[1].err == f"{message}\n"
    assert project.read_metrics("resnet")["parameters"] == 11_176_512 + 2 * 513
    assert f"_target_={target}" in results[3].err and "allowed_packages in the file conf/train.yaml" in results[3].err
    assert json.loads(results[4].out)[0]["digit"] in range(10)

    project.replace("conf/train.yaml", "allowed_packages: []", allowed)
    project.run(own, f"{predict} own", codes=[0, 0])
    assert project.read_metrics("own")["parameters"] == 32 * 785 + 10 * 33


# Stop the first run before a batch in the middle of the second epoch, of 32 batches.
STOP = """
import pathlib, signal
from lightning.pytorch.callbacks import Callback
class Stop(Callback):
    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == 43 and not pathlib.Path("stopped").exists():
            pathlib.Path("stopped").touch()
            signal.raise_signal(signal.SIGTERM)
"""


def test_imbalanced_classes_are_scored_by_own_metrics_and_trained_weights_fine_tuned(project):
    imbalance, tuning = read_section("Loss, metrics and imbalance"), read_section("Fine-tuning")
    project.write(read_files(imbalance))
    (weighted, sampled), (tuned, other, _) = read_commands(imbalance), read_commands(tuning)
    commands = [add(x, f"run{n}", *SHORT) for n, x in enumerate((weighted, tuned, other, sampled))]
    results = project.run(*commands, "python -m src.evaluate run0 --best", codes=[0] * 5)
    metrics = project.read_metrics("run0")
    assert {"val/macro_f1", "test/macro_f1", "test/recall/cat"} <= metrics["metrics"].keys()
    assert metrics["best_epoch"] == 1 and "macro_f1 " in results[4].out


def test_own_task_is_ranked_by_its_metric_and_resumes(project):
    text = read_section("Task")
    project.write({**read_files(text), "src/training/stop.py": STOP})
    single, sweep, tune = read_commands(text)
    stopped = *FAST, "trainer.max_epochs=2", "+callbacks.stop._target_=src.training.stop.Stop"
    short = *FAST, "trainer.max_epochs=1"
    sweep = shlex.join([*shlex.split(sweep), *short, "hydra.sweep.dir=swept"])
    commands = add(single, "run", *FAST), sweep, add(tune, "tuned", *short), add(single, "cut", *stopped)
    evaluate = "python -m src.evaluate run --best --output=scores"
    results = project.run(*commands, "python -m src.train resume=cut", evaluate, codes=[0, 0, 0, 143, 0, 0])
    predict = project.run("python -m src.predict --weights run tests/images/5.jpg", codes=[2])[0]
    assert "Regression was not trained on images with classes" in predict.err and len(predict.err.splitlines()) == 1
    metrics = project.read_metrics("run")
    assert metrics["name"] == "regression" and metrics["parameters"] == 2 and metrics["epochs"] == 5
    assert metrics["metrics"]["val/rmse"] < 0.1 and "test/rmse" in metrics["metrics"]
    assert json.loads((project.folder / "scores/scores.json").read_text())["test/rmse"] < 0.1
    assert project.load("run", "best")["epoch"] + 1 == metrics["best_epoch"]
    jobs = [file.parent.name for file in project.folder.glob("swept/*/metrics.json")]
    best = min(jobs, key=lambda job: project.read_metrics(f"swept/{job}")["metrics"]["val/rmse"])
    assert len(jobs) == 2 and best in results[1].out.rpartition("Best")[2]
    assert len(list(project.folder.glob("tuned/*/metrics.json"))) == 3
    project.run(add(single, "whole", *stopped), codes=[0])
    assert project.read_metrics("cut")["metrics"] == project.read_metrics("whole")["metrics"]


def test_own_option_and_callback_take_effect(project):
    project.write(read_files(text := read_section("Optimizer and scheduler") + read_section("Callbacks and loggers")))
    option, callback, *lightning = read_commands(text)
    option = add(option, "option", *SHORT, "trainer.max_epochs=2", "trainer.log_every_n_steps=1")
    others = [add(command, f"lightning{n}", *SHORT) for n, command in enumerate(lightning)]
    results = project.run(option, add(callback, "callback", *SHORT), *others, codes=[0] * 5)
    metrics = project.read_metrics("option")["metrics"]
    assert metrics["lr/head"] == pytest.approx(2 * metrics["lr/rest"])
    assert metrics["lr/head"] == pytest.approx(0.002 / 15)  # before the last step
    assert list((project.folder / "option").glob("events*")) and (project.folder / "option/metrics.csv").is_file()
    assert "square_avg" in project.load("option")["optimizer_states"][0]["state"][0]
    assert "goodbye after step 10" in results[1].out.splitlines()


def test_notebook_code_predicts_test_images_and_trains_by_a_config(project):
    pages = read_section("In a notebook") + (ROOT / "docs/training.md").read_text()
    code, train = re.findall(r"```python\n(.*?)```", pages, re.S)
    project.execute(sys.executable, "-c", train.replace('"data=digits"', str(["data=digits", *SHORT])[1:-1]))
    assert list(project.folder.glob("outputs/mnist/*/.hydra/config.yaml"))  # can be resumed
    check = "print(float((log_probabilities.argmax(1) == data.splits.test.labels.cpu()).float().mean()))"
    lines = project.execute(sys.executable, "-W", "ignore", "-c", f"{code}{check}").splitlines()
    assert lines[0] == "5" and float(lines[-1]) > 0.5


def test_notebook_trains_and_checks_a_gradient(project):
    notebook = nbformat.read(project.folder / "docs/notebook.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": project.folder / "docs"}}).execute()
    text = "".join(str(output.get("text")) for cell in notebook.cells for output in cell.get("outputs", []))
    accuracy, test_acc = (re.findall(rf"{name} +([\d.]+)%", text)[0] for name in ("test accuracy", "test/acc"))
    assert min(float(accuracy), float(test_acc)) > 90  # by Lightning alone, and by the command
    assert len(set(re.findall(r"(0\.\d+) by", text))) == 1


def test_renamed_package_trains_and_predicts(project):
    (command,) = read_commands(read_section("Rename the package"))
    commit = "git -c user.name=a -c user.email=a@b.c commit -q -m all"
    project.execute("bash", "-ec", f"git init -q && git add -A && {commit} && {command}")
    assert not project.execute("bash", "-ec", r"git grep -hIwP '(?<![\w.])src(?!=)' || true")
    train = add("python -m lab.train data=digits", "run", *SHORT)
    predict = "python -m lab.predict tests/images/5.jpg --json"
    results = project.run(train, f"{predict} --weights run", predict, codes=[0, 0, 0])
    assert json.loads(results[2].out)[0]["digit"] == 5  # by the shipped weights


def test_deleted_parts_are_not_missed(project):
    text = read_section("What may be deleted")
    parts = re.findall(r"^# ([\d,]+) lines: .*\n((?:(?![#`]).+\n)+)", text, re.M)

    def count_lines(folder: Path) -> int:
        return sum(file.read_text().count("\n") for file in folder.glob("src/**/*.py"))

    names = [file.relative_to(project.folder) for file in project.folder.glob("[sc]*/**/*.[py]*")]
    for number, (lines, command) in enumerate(parts):  # each part by itself, the last one after all others
        earlier = "".join(command for _, command in parts[:number]) if number == len(parts) - 1 else ""
        part = project.folder.parent / f"part{number}"
        project.execute("bash", "-ec", f"cp -r . {part} && cd {part}\n{earlier}find src -name '*.py' | xargs cat > all")
        before = (part / "all").read_text().count("\n")
        project.execute("bash", "-ec", f"cd {part}\n{command.replace('rm -rf', 'rm -r')}")  # it names what exists
        assert before - count_lines(part) == pytest.approx(int(lines.replace(",", "")), rel=0.1), command
        deleted = [(".".join(name.parent.parts), name.stem) for name in names if not (part / name).exists()]
        uses = [rf"from {parent}(\.| import .*\b){name}\b|_target_: {parent}\.{name}\b" for parent, name in deleted]
        uses += [f'"{parent[5:]}={name}"' for parent, name in deleted if parent.startswith("conf.")]
        for file in (*part.glob("src/**/*.py"), *part.glob("conf/**/*.yaml"), *part.glob("tests/[!d]*/*.py")):
            assert not (use := re.search("|".join(uses), file.read_text())), (command, file, use)
    (left,) = re.findall(r"leave ([\d,]+) lines", text)
    assert count_lines(part) == pytest.approx(int(left.replace(",", "")), rel=0.02)
    chosen = "-n0", "-k", "test_every_config_composes or alone_and_in_a_multirun", "tests/training/test_train.py"
    pytest_command = f"cd {part} && {sys.executable} -m pytest -q -p no:cacheprovider"
    assert " passed" in project.execute("bash", "-ec", f"{pytest_command} {shlex.join(chosen)}")
