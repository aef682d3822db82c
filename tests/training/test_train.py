import csv
import json
import math
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.core.config import CONF, resolve_config, validate_config

TINY = "model.channels=[4,4,4,4,4,4]", "data=digits", "trainer.max_epochs=1", "optimizer.lr=0.05"
PLAIN = "++callbacks.tensorboard=null", "trainer.limit_train_batches=12"


@pytest.fixture
def train(run_main, tmp_path):
    """Train a tiny network on digits; return the result and the run folder."""

    def run(*overrides, folder="run", plain=PLAIN[:1]):
        result = run_main(*TINY, *plain, f"hydra.run.dir={tmp_path / folder}", *overrides)
        return result, tmp_path / folder

    return run


def read_weights(folder: Path) -> torch.Tensor:
    state = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return torch.cat([tensor.flatten().double() for tensor in state.values()])


def test_run_writes_every_file_into_its_folder(train, tmp_path):
    result, folder = train("trainer.max_epochs=2", plain=())
    assert result.code == 0, result.err
    assert "digits" in result.out and "epoch 2/2" in result.out and "\x1b" not in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["data"] == "digits" and metrics["epochs"] == 2 and metrics["seed"] == 0
    assert metrics["samples_per_second"] == pytest.approx(2 * 1287 / metrics["seconds"]["fit"], rel=0.05)
    assert metrics["parameters"] == 1_788 and metrics["best_epoch"] in (1, 2)
    names = {f"{stage}/{name}" for stage in ("train", "val", "test") for name in ("loss", "acc")}
    assert names <= metrics["metrics"].keys()
    printed = [line.split() for line in result.out.splitlines()]
    assert ["test/acc", f"{100 * metrics['metrics']['test/acc']:.2f}%"] in printed
    for text in result.out, (folder / "layers.txt").read_text():
        assert re.search(r"net +CNN .* 1,788$", text, re.M)
    assert OmegaConf.load(folder / ".hydra/config.yaml").trainer.max_epochs == 2
    assert torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["epoch"] == metrics["best_epoch"] - 1
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("val/acc %")) == 2
    assert {"train/loss", "train/acc %", "train/loss_step", "lr"} <= set(events.Tags()["scalars"])


def predict_test_images(folder: Path, checkpoint: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probabilities and labels of the test images, by the weights and the config alone."""
    from hydra.utils import instantiate

    config = OmegaConf.load(folder / ".hydra/config.yaml")
    net = instantiate(config.model).eval()
    state = torch.load(folder / f"checkpoints/{checkpoint}.ckpt", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("net."): tensor for name, tensor in state.items() if name[:4] == "net."})
    data = instantiate(config.data)
    data.setup("test")
    images, labels = data.splits.test[:]
    with torch.no_grad():
        return net(data.spec.normalize(images)).log_softmax(1), labels


def test_logged_metrics_are_those_of_the_final_weights(train):
    _, folder = train("model.dropout=0.1", "data.eval_batch_size=37")  # the last batch is a smaller one
    log_probabilities, labels = predict_test_images(folder, "last")
    metrics = json.loads((folder / "metrics.json").read_text())["metrics"]
    assert metrics["test/acc"] == pytest.approx((log_probabilities.argmax(1) == labels).float().mean().item())
    expected = torch.nn.functional.nll_loss(log_probabilities, labels).item()
    assert metrics["test/loss"] == pytest.approx(expected, rel=1e-4)


def test_best_and_last_weights_are_tested(train):
    stop = "_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss,min_delta:9,patience:1"
    worst = "callbacks.best.mode=min"  # so that the best epoch is not the last
    result, folder = train("trainer.max_epochs=9", f"+callbacks.stop={{{stop}}}", "test=best", worst, *PLAIN)
    assert result.code == 0, result.err
    results = json.loads((folder / "metrics.json").read_text())
    assert results["epochs"] == 2 and results["best_epoch"] == 1
    for name, key in ("last", "test/acc"), ("best", "test/best/acc"):
        log_probabilities, labels = predict_test_images(folder, name)
        accuracy = (log_probabilities.argmax(1) == labels).float().mean().item()
        assert results["metrics"][key] == pytest.approx(accuracy)
    assert results["metrics"]["test/acc"] != results["metrics"]["test/best/acc"]
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Scalars("test/acc %")) == 1
    result, _ = train("test=best", "optimized_metric=null", *PLAIN, folder="other")
    assert result.code == 2 and "test=best: no callback keeps the best weights" in result.err


@pytest.mark.parametrize("seed", [0, 3])
def test_equal_seeds_give_bitwise_equal_weights_alone_and_in_a_multirun(train, run_main, tmp_path, seed):
    some = *PLAIN, "model.dropout=0.1"
    _, alone = train(f"seed={seed}", *some, folder="alone")
    result = run_main("-m", *TINY, f"seed=7,{seed}", *some, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert result.code == 0, result.err
    files = (tmp_path / "sweep").glob("*/metrics.json")
    weights = {json.loads(file.read_text())["seed"]: read_weights(file.parent) for file in files}
    assert torch.equal(read_weights(alone), weights[seed]) and not torch.equal(weights[seed], weights[7])


@pytest.mark.parametrize(
    "mistake, words",
    [
        ("trainer.max_epoch=3", "did you mean trainer.max_epochs?"),
        ("+trainer.max_epoch=3", "did you mean trainer.max_epochs?"),
        ("max_epochs=3", "did you mean trainer.max_epochs?"),
        ("optimiser.lr=3", "did you mean optimizer.lr?"),
        ("optimzer=sgd", "did you mean optimizer?"),
        ("+data.nonsense=3", "nonsense"),
        ("model=cn", "backprop cnn separable_cnn"),
        ("model", "model"),
        ("optimizer.lr=???", "optimizer.lr"),
        ("seed=abc", "must be 0 ≤ int < 4294967296"),
        ("seed=-1", "must be 0 ≤ int < 4294967296"),
        ("model.dropout=2", "must be 0 ≤ float < 1"),
        ("model.channels=[1,2]", "expected 6"),
        ("model.blur=2", "must be 0 ≤ float ≤ 1"),
        ("data.augment.interpolation=cubic", "one of bilinear, bicubic"),
        ("optimizer.lr=nan", "must be float > 0"),
        ("data.batch_size=1.5", "must be int ≥ 1"),
        ("trainer.max_epochs=three", "must be int or null"),
        ("trainer.precision=7", "precision"),
        ("trainer.devices=none", "devices"),
        ("optimized_metric=val/accuracy", "val/acc"),
        ("optimized_metric=test/acc", "other than test"),
        ("callbacks.best.monitor=val/accuracy", "val/accuracy"),
        ("trainer.max_epochs=-1", "Expected positive integer total_steps, but got inf"),
        pytest.param(
            "trainer.accelerator=gpu",
            "no GPU was found; set trainer.accelerator=cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_mistake_prints_one_line_and_removes_the_new_folder(train, mistake, words):
    result, folder = train("trainer.max_epochs=50", mistake)
    assert result.code == 2 and "epoch 2/50" not in result.out
    assert len(result.err.splitlines()) == 1 and result.err.startswith("error: ") and words in result.err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("more", "steps"),
    [
        (["debug=default"], 1),
        (["+optimizer.maximize=false", "trainer.limit_train_batches=1"], 1),  # of a one-cycle schedule
        (["logger=none", "trainer.limit_train_batches=5"], 5),
        (["logger=[tensorboard,csv]", "scheduler=plateau", "trainer.limit_train_batches=6"], 6),
        (["trainer.profiler=simple", "trainer.limit_train_batches=6"], 6),
        (["callbacks=default", "callbacks.best=null", "trainer.limit_train_batches=6"], 6),
        (["trainer.check_val_every_n_epoch=2", "trainer.max_epochs=2", "trainer.limit_train_batches=6"], 12),
        (["trainer.overfit_batches=2", "trainer.max_epochs=2"], 4),
    ],
)
def test_common_overrides_train(train, more, steps):
    result, folder = train(*more)
    assert result.code == 0, result.err
    assert json.loads((folder / "metrics.json").read_text())["steps"] == steps
    assert ("FIT Profiler Report" in result.out + result.err) == ("trainer.profiler=simple" in more)


def test_max_time_ends_a_run(train):
    result, folder = train("trainer.max_epochs=100000", "trainer.max_time={seconds: 3}", "scheduler=none")
    assert result.code == 0, result.err
    assert 0 < json.loads((folder / "metrics.json").read_text())["epochs"] < 1000


def test_cosine_schedule_steps_per_epoch(train):
    _, folder = train("trainer.max_epochs=4", "trainer.limit_train_batches=3", "scheduler=cosine", "logger=csv")
    with (folder / "metrics.csv").open() as file:
        rates = [float(row["lr"]) for row in csv.DictReader(file) if row["lr"]]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)])


@pytest.mark.parametrize(
    "mistake, words",
    [
        (["trainer.val_check_interval=1000"], "val_check_interval"),
        (["+callbacks.x={_target_:lightning.pytorch.callbacks.BatchSizeFinder}"], "-m data.batch_size="),
        (["+callbacks.x={_target_:lightning.pytorch.callbacks.EarlyStopping,monitor:val_loss}"], "`val_loss`"),
        (["+callbacks.x={_target_:lightning.pytorch.callbacks.LearningRateFinder}"], "set scheduler=none"),
    ],
)
def test_mistake_found_at_training_start_prints_one_line(train, mistake, words):
    result, _ = train(*mistake)
    assert result.code == 2 and "Traceback" not in result.err
    assert result.err.splitlines()[-1].startswith("error: ") and words in result.err.splitlines()[-1]


@pytest.mark.parametrize("override", ["data.val_size=0", "trainer.max_steps=1", "trainer.check_val_every_n_epoch=9"])
def test_run_without_validation_is_recorded_and_names_what_it_has_logged(train, override):
    result, folder = train("trainer.limit_train_batches=6", override, "callbacks.best=null", "scheduler=none")
    assert result.code == 2 and "optimized_metric=val/acc: not logged" in result.err
    assert "test/acc" in json.loads((folder / "metrics.json").read_text())["metrics"]


def test_bug_raises_its_traceback(train, monkeypatch):
    import lightning as L

    def broken(*_, **__):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(L.Trainer, "fit", broken)
    with pytest.raises(ZeroDivisionError):
        train()


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["trainer.max_epoch=3"], ["seed=abc"]])
def test_help_and_mistakes_do_not_import_pytorch(arguments):
    code = f"""
import sys
from src.train import main
sys.argv[1:] = {arguments}
try:
    main()
finally:
    slow = {{"torch", "lightning", "torchvision", "sklearn", "matplotlib"}} & set(sys.modules)
    assert not slow, slow
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AssertionError" not in done.stderr, done.stderr
    assert done.returncode == (0 if arguments[0].startswith("--") else 2), done.stderr


@pytest.mark.parametrize("choice", [f"{file.parent.name}={file.stem}" for file in sorted(CONF.glob("*/*.yaml"))])
def test_every_config_composes_and_validates(choice):
    roots = ["tune"] if choice.startswith("search=") else [file.stem for file in CONF.glob("*.yaml")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for root in roots:
            config = compose(root, overrides=[choice, "output_dir=."])
            if OmegaConf.is_missing(config.data, "dataset"):  # what others begin with
                config.data.dataset = {"_target_": "src.data.datasets.Digits"}
            with suppress(MissingMandatoryValue):  # an own config may leave a key to the command line
                OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
                validate_config(resolve_config(config))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_trains(train):
    result, folder = train("trainer.accelerator=gpu")
    assert result.code == 0, result.err
    assert "NVIDIA" in json.loads((folder / "metrics.json").read_text())["device"]


@pytest.mark.slow
@pytest.mark.mnist
def test_a_third_of_an_epoch_on_mnist_reaches_98_percent(run_main, real_mnist, tmp_path):
    short = "trainer.max_epochs=1", "trainer.limit_train_batches=0.3", PLAIN[0]
    result = run_main(*short, f"data.root={real_mnist}", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]["test/acc"] > 0.98
