"""Every option of these groups in conf/ trains, and a killed run of it resumes with bitwise identical results."""

import json
import shutil
import socket
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from conftest import SimulatedKill, read_outcome

from src import evaluate
from src.core.config import CONF

GROUPS = "data", "model", "optimizer", "scheduler", "logger", "debug"
OPTIONS = [(group, file.stem) for group in GROUPS for file in sorted((CONF / group).glob("*.yaml"))]
DEFAULTS = {"data": "digits", "model": "cnn", "optimizer": "sgd", "scheduler": "onecycle", "logger": "csv"}
SIZES = {"train": 40, "test": 20}
# Two epochs of four batches, or eight of one, with a checkpoint before every second batch.
TINY = (
    *("trainer.accelerator=cpu", "trainer.max_epochs=8", "trainer.max_steps=8", "trainer.limit_train_batches=4"),
    *("trainer.limit_val_batches=1", "trainer.log_every_n_steps=2", "callbacks.resume.every_steps=2"),
    *("callbacks.tensorboard=null", "callbacks.model_summary=null"),
)


def choose_options(group: str, option: str) -> dict[str, str]:
    """Choose what an option needs: the experiment that has it with its data and model, or both of one name."""
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        defaults = [item for item in yaml.safe_load(file.read_text()).get("defaults", []) if isinstance(item, dict)]
        chosen = {key.removeprefix("override /"): value for item in defaults for key, value in item.items()}
        if chosen.get(group) == option and {"data", "model"} <= chosen.keys() and DEFAULTS.get(group) != option:
            return {"experiment": file.stem, "logger": DEFAULTS["logger"]}
    is_pair = group in ("data", "model") and all(
        (CONF / part / f"{option}.yaml").is_file() for part in ("data", "model")
    )
    return DEFAULTS | ({"data": option, "model": option} if is_pair else {group: option})


@pytest.fixture
def data_overrides(tmp_path, mnist_root, image_folder, small_weights):
    """Return the overrides for data made on the spot, by the name of the config; None for a user's own config."""

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
    return lambda name: [*known[name](), "data.batch_size=8", "data.val_size=8"] if name in known else None


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_option_trains_and_resumes_bitwise(
    run_main, tmp_path, monkeypatch, recwarn, data_overrides, interrupt_at, group, option
):
    chosen = choose_options(group, option)
    images = data_overrides(chosen.get("data", option))
    overrides = [*(f"{key}={name}" for key, name in chosen.items()), *TINY, *(images or ())]
    overrides += ["model.channels=[4,4,4,4,4,4]"] if chosen.get("model") == "cnn" else []
    if group == "logger" and option in ("wandb", "mlflow"):
        pytest.importorskip(option)
        monkeypatch.setenv("WANDB_MODE", "offline")
        overrides += ["logger.mlflow.tracking_uri='sqlite:///${output_dir}/mlflow.db'"] * (option == "mlflow")
    monkeypatch.setattr(socket, "getaddrinfo", Mock(side_effect=OSError("tests do not use the network")))
    result = run_main(*overrides, f"hydra.run.dir={tmp_path / 'uninterrupted'}")
    if images is None and result.code == 2:
        pytest.skip(f"its data is not there: {result.err}")
    assert result.code == 0, result.err
    folder = tmp_path / "run"
    for batch in (5, 4, 7) if group == "logger" else (7,):  # within the second epoch, at its start, and later
        interrupt_at(batch, SimulatedKill)
        with pytest.raises(SimulatedKill):
            run_main(*([f"resume={folder}"] if folder.exists() else [*overrides, f"hydra.run.dir={folder}"]))
    result = run_main(f"resume={folder}")
    assert result.code == 0, result.err
    outcome = read_outcome(folder)
    if images is None and any("is drawn anew" in str(warning.message) for warning in recwarn):
        pytest.skip("its DataLoader has no state, as the run has warned")
    assert outcome == read_outcome(tmp_path / "uninterrupted")

    if (accuracy := outcome["metrics"].get("test/acc")) is not None:
        monkeypatch.setattr("src.training.plots.save_figure", lambda *_: None)
        result = run_main(folder, "--output", tmp_path, main=evaluate.main)
        assert result.code == 0, result.err
        assert json.loads((tmp_path / "scores.json").read_text())["accuracy"] == accuracy
