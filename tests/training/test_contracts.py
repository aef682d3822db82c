"""Every file of these groups in conf/ can be chosen: it trains, and a killed run of it continues to the same bits."""

import csv
import hashlib
import json
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src import evaluate
from src.core.config import CONF, resolve_config
from src.core.errors import UserError
from src.training.instantiate import instantiate_node
from src.training.predictor import load_predictor
from src.training.resume import ResumeCheckpoint

GROUPS = "data", "model", "optimizer", "scheduler", "logger", "debug"
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
# What is chosen where another group varies; data=digits is bundled, and the rows of CSV are compared as well.
BASE = {"data": "digits", "model": "cnn", "optimizer": "sgd", "scheduler": "onecycle", "logger": "csv"}
# Two epochs of four batches, or eight of one. A checkpoint before each batch of an even number, from 0.
TINY = (
    *("trainer.accelerator=cpu", "trainer.max_epochs=8", "trainer.max_steps=8", "trainer.limit_train_batches=4"),
    *("trainer.limit_val_batches=1", "trainer.log_every_n_steps=2", "callbacks.resume.every_steps=2"),
    *("callbacks.tensorboard=null", "callbacks.model_summary=null"),
)
SMALL_IMAGES = "data.batch_size=8", "data.val_size=8"
SMALL_CNN = ("model.channels=[4,4,4,4,4,4]",)
# Batches that a run is killed before: in the second epoch; or where that begins, just after resuming, and later.
ONCE, OFTEN = (7,), (5, 4, 7)


def experiment_of(group: str, option: str) -> str | None:
    """The experiment that an option comes with, if it is in those alone that choose both the data and the model."""
    choices = {}
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        defaults = [each for each in yaml.safe_load(file.read_text()).get("defaults", []) if isinstance(each, dict)]
        choices[file.stem] = {key.removeprefix("override /"): value for each in defaults for key, value in each.items()}
    naming = {name: chosen for name, chosen in choices.items() if chosen.get(group) == option}
    whole = naming and all({"data", "model"} <= chosen.keys() for chosen in naming.values())
    return next(iter(naming)) if whole and BASE.get(group) != option else None


def choices_for(group: str, option: str) -> dict[str, str]:
    """What else is chosen with an option; data and a model of one name make a task of the user's own."""
    if experiment := experiment_of(group, option):
        return {"experiment": experiment, "logger": BASE["logger"]}
    if group == "model" and "torchvision.models" in (CONF / f"model/{option}.yaml").read_text():
        return BASE | {"model": option, "data": "folder"}  # they need colour
    both = group in ("data", "model") and all((CONF / part / f"{option}.yaml").is_file() for part in ("data", "model"))
    return BASE | ({"data": option, "model": option} if both else {group: option})


class Killed(BaseException):
    """Ends a run as SIGKILL would: nothing is written any more."""


@pytest.fixture
def kill(monkeypatch):
    """Makes the next run end before batch `at`, counted from 0 over all epochs."""
    original = ResumeCheckpoint.on_train_batch_start

    def before(at):
        def on_train_batch_start(self, trainer, *arguments):
            if trainer.fit_loop.epoch_loop.batch_progress.total.completed == at:
                monkeypatch.setattr(ResumeCheckpoint, "on_train_batch_start", original)
                for logger in trainer.loggers:
                    logger.finalize = lambda status: None  # else Lightning lets it write
                raise Killed
            original(self, trainer, *arguments)

        monkeypatch.setattr(ResumeCheckpoint, "on_train_batch_start", on_train_batch_start)

    return before


@pytest.fixture
def data_overrides(tmp_path, mnist_root, small_weights):
    """Data made on the spot, by the name of the config: None for one that this file does not know."""

    def idx(name):
        shutil.copytree(mnist_root / "MNIST", tmp_path / name / name)
        return (f"data.root={tmp_path / name}",)

    def folder():
        generator = np.random.default_rng(0)
        for i in range(60):
            file = tmp_path / f"pictures/{'abc'[i % 3]}/{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(256, size=(20 + i % 7, 40 - i % 5, 3), dtype=np.uint8)).save(file)
        return (f"data.root={tmp_path / 'pictures'}",)

    def npz():
        generator, arrays = np.random.default_rng(0), {}
        for part, count in ("train", 40), ("test", 20):
            arrays[f"{part}_images"] = generator.integers(256, size=(count, 20, 16, 3), dtype=np.uint8)
            arrays[f"{part}_labels"] = np.arange(count) % 4
        np.savez(tmp_path / "own.npz", **arrays)
        return (f"data.root={tmp_path / 'own.npz'}",)

    teacher = f"data.soft_labels.teachers=[{small_weights}]", f"data.soft_labels.folder={tmp_path / 'answers'}"
    known = {
        "digits": tuple,
        "images": lambda: ("data.dataset={_target_:src.data.datasets.Digits}",),
        "mnist": lambda: (f"data.root={mnist_root}",),
        "auto": lambda: (f"data.root={mnist_root}",),
        "reinforced": lambda: (f"data.root={mnist_root}", *teacher),
        "fashion": lambda: idx("FashionMNIST"),
        "kmnist": lambda: idx("KMNIST"),
        "folder": folder,
        "npz": npz,
    }
    return lambda name: (*SMALL_IMAGES, *known[name]()) if name in known else None


def skip_without_data(overrides, monkeypatch) -> None:
    """For a config of the user's own, which runs as it is. Nothing is downloaded for a test."""

    def no_network(*_, **__):
        raise OSError("tests do not use the network")

    with initialize_config_dir(str(CONF), version_base="1.3"), monkeypatch.context() as patch:
        config = compose("train", overrides=[*overrides, "output_dir=."])
        patch.setattr(socket, "getaddrinfo", no_network)
        try:
            instantiate_node("data", resolve_config(config).data).prepare_data()
        except (UserError, OSError) as error:
            pytest.skip(f"its data is not there: {error}")


def plain(state):
    """The same for the same bits, and no other."""
    if isinstance(state, torch.Tensor):
        content = state.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(state.dtype), tuple(state.shape), hashlib.sha256(content).hexdigest()
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return [plain(value) for value in state] if isinstance(state, list | tuple) else state


def history(folder: Path) -> list:
    """What a logger has kept of the run."""
    if (folder / "metrics.csv").is_file():
        with (folder / "metrics.csv").open(newline="") as stream:
            return [{key: value for key, value in row.items() if value} for row in csv.DictReader(stream)]
    if (folder / "mlflow.db").is_file():
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
        runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
        kept = [
            each
            for run in runs
            for name in run.data.metrics
            for each in client.get_metric_history(run.info.run_id, name)
        ]
        return [len(runs), *sorted({(each.key, each.step, each.value) for each in kept})]  # no step can be taken back
    if (folder / "wandb").is_dir():  # the fourth part of a name is the id of a run of W&B
        return [len({part.name.split("-")[3] for part in (folder / "wandb").glob("offline-run-*")})]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [(tag, event.step, event.value) for tag in events.Tags()["scalars"] for event in events.Scalars(tag)]


def outcome(folder: Path) -> dict:
    last, *best = (
        torch.load(file, weights_only=True)
        for name in ("last", "best")
        if (file := folder / f"checkpoints/{name}.ckpt").is_file()
    )
    results = json.loads((folder / "metrics.json").read_text())
    return {
        **{part: plain(last[part]) for part in ("state_dict", "optimizer_states", "lr_schedulers")},
        "best": [plain(each["state_dict"]) for each in best],
        "results": {name: results[name] for name in ("parameters", "epochs", "best_epoch", "steps", "metrics")},
        "history": history(folder),
        "hparams": [file.read_text() for file in folder.glob("hparams.yaml")],
    }


@pytest.fixture(scope="module")
def outcomes():
    return {}


@pytest.fixture
def run(run_main, tmp_path, kill, outcomes):
    """Runs what is given as a whole, unless that was done before, and killed and continued; compares the two."""

    def both(overrides, kills):
        if overrides not in outcomes:
            result = run_main(*overrides, f"hydra.run.dir={tmp_path / 'whole'}")
            assert result.code == 0, result.err
            outcomes[overrides] = outcome(tmp_path / "whole")
        folder = tmp_path / "run"
        for at in kills:
            kill(at)
            with pytest.raises(Killed):
                run_main(*([f"resume={folder}"] if folder.exists() else [*overrides, f"hydra.run.dir={folder}"]))
        result = run_main(f"resume={folder}")
        assert result.code == 0, result.err
        whole, continued = outcomes[overrides], outcome(folder)
        return folder, continued, [part for part in whole if continued[part] != whole[part]]

    return both


@pytest.mark.parametrize("group, option", OPTIONS)
def test_a_config_trains_and_continues_to_the_same_bits(
    run_main, tmp_path, monkeypatch, recwarn, data_overrides, run, group, option
):
    chosen = choices_for(group, option)
    images = data_overrides(chosen.get("data", option))
    overrides = (*(f"{key}={name}" for key, name in chosen.items()), *TINY, *(images or ()))
    if chosen.get("model") == "cnn":
        overrides += SMALL_CNN
    if group == "logger" and option in ("wandb", "mlflow"):
        pytest.importorskip(option)
        monkeypatch.setenv("WANDB_MODE", "offline")
        overrides += ("logger.mlflow.tracking_uri='sqlite:///${output_dir}/mlflow.db'",) if option == "mlflow" else ()
    if images is None:
        skip_without_data(overrides, monkeypatch)

    folder, found, other = run(overrides, OFTEN if group == "logger" else ONCE)
    if images is None and other and any("cannot tell where it was" in str(one.message) for one in recwarn):
        pytest.skip("its DataLoader cannot tell where it was, as the run has warned")
    assert not other and found["results"]["steps"] == 8
    if chosen["logger"] == "csv":
        scores = [(row["step"], *sorted(row.keys() - {"step"})) for row in found["history"] if "/" in "".join(row)]
        assert scores and len(set(scores)) == len(scores)

    accuracy = found["results"]["metrics"].get("test/acc")
    if accuracy is not None:
        assert load_predictor(folder).file == folder / "checkpoints/last.ckpt"
        if group not in ("data", "model"):
            monkeypatch.setattr("src.training.plots.save", lambda *_: None)  # the pictures depend on these alone
        result = run_main(folder, "--output", tmp_path, main=evaluate.main)
        assert result.code == 0, result.err
        assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == accuracy
