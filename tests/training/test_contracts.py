"""Every option of these groups in conf/ trains, and a killed run of it resumes with bitwise identical results."""

import json
import shutil
import socket
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import SimulatedKill, read_outcome

from src.core.config import CONF

SHIPPED = {  # own files in conf/ are not tested here
    "data": "auto backprop digits fashion folder images kmnist mnist mnist_soft_labels npz",
    "model": "backprop cnn separable_cnn",
    "optimizer": "adamw gradient_descent muon sgd",
    "scheduler": "cosine none onecycle plateau",
    "logger": "csv mlflow none tensorboard wandb",
    "debug": "default",
}
OPTIONS = [(group, name) for group, names in SHIPPED.items() for name in names.split()]
OPTIONS = [(group, name) for group, name in OPTIONS if (CONF / group / f"{name}.yaml").is_file()]
DEFAULTS = {"data": "digits", "model": "cnn", "optimizer": "sgd", "scheduler": "onecycle", "logger": "csv"}
SIZES = {"train": 40, "test": 20}
# Two epochs of four batches, or eight of one, with a checkpoint before every second batch.
TINY = (
    *("trainer.accelerator=cpu", "trainer.max_epochs=8", "trainer.max_steps=8", "trainer.limit_train_batches=4"),
    *("trainer.limit_val_batches=1", "trainer.log_every_n_steps=2", "callbacks.resume.every_steps=2"),
    *("++callbacks.tensorboard=null", "callbacks.model_summary=null"),
)


def choose_options(group: str, option: str) -> dict[str, str]:
    if option in ("backprop", "gradient_descent"):
        return {"experiment": "backprop", "logger": DEFAULTS["logger"]}
    return DEFAULTS | {group: option}


@pytest.fixture
def data_overrides(tmp_path, mnist_root, image_folder, small_weights):
    """Return the overrides for data made on the spot, by the name of the config."""

    def copy_mnist(name):
        shutil.copytree(mnist_root / "MNIST", tmp_path / name / name)
        return [f"data.root={tmp_path / name}"]

    def write_npz():
        draw = np.random.default_rng(0).integers
        images = {f"{part}_images": draw(256, size=(n, 20, 16, 3), dtype="uint8") for part, n in SIZES.items()}
        np.savez(tmp_path / "own.npz", **images, **{f"{part}_labels": np.arange(n) % 4 for part, n in SIZES.items()})
        return [f"data.root={tmp_path / 'own.npz'}"]

    soft_labels = f"data.soft_labels.teachers=[{small_weights}]", f"data.soft_labels.folder={tmp_path / 'soft_labels'}"
    known = {
        "digits": list,
        "images": lambda: ["data.dataset={_target_:src.data.datasets.Digits}"],
        "mnist": lambda: [f"data.root={mnist_root}"],
        "auto": lambda: [f"data.root={mnist_root}"],
        "mnist_soft_labels": lambda: [f"data.root={mnist_root}", *soft_labels],
        "fashion": lambda: copy_mnist("FashionMNIST"),
        "kmnist": lambda: copy_mnist("KMNIST"),
        "folder": lambda: [f"data.root={image_folder}"],
        "npz": write_npz,
    }
    return lambda name: [*known[name](), "data.batch_size=8", "data.val_size=8"] if name in known else []


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_trains_and_resumes(run_main, tmp_path, monkeypatch, data_overrides, interrupt_at, group, option):
    chosen = choose_options(group, option)
    images = data_overrides(chosen.get("data", option))
    overrides = [*(f"{key}={name}" for key, name in chosen.items()), *TINY, *images]
    overrides += ["model.channels=[4,4,4,4,4,4]"] if chosen.get("model") == "cnn" else []
    if group == "logger" and option in ("wandb", "mlflow"):
        pytest.importorskip(option)
        monkeypatch.setenv("WANDB_MODE", "offline")
        overrides += ["logger.mlflow.tracking_uri='sqlite:///${output_dir}/mlflow.db'"] * (option == "mlflow")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError("tests do not use the network")))
    result = run_main(*overrides, f"hydra.run.dir={tmp_path / 'uninterrupted'}")
    assert result.code == 0, result.err
    folder = tmp_path / "run"
    for batch in (5, 4, 7) if group == "logger" else (7,):  # within the second epoch, at its start, and later
        interrupt_at(batch, SimulatedKill)
        with pytest.raises(SimulatedKill):
            run_main(*([f"resume={folder}"] if folder.exists() else [*overrides, f"hydra.run.dir={folder}"]))
    result = run_main(f"resume={folder}")
    assert result.code == 0, result.err
    outcome = read_outcome(folder)
    assert outcome == read_outcome(tmp_path / "uninterrupted")

    if (accuracy := outcome["metrics"].get("test/acc")) is not None and find_spec("src.evaluate"):
        monkeypatch.setattr("src.core.plots.save_figure", lambda *_: None)
        result = run_main(folder, "--output", tmp_path, main=import_module("src.evaluate").main)
        assert result.code == 0, result.err
        assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == accuracy
