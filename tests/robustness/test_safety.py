"""What comes from strangers or is damaged: refused in one line, nothing run, nothing destroyed."""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from src.command import entry
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from src import predict, report, train
from src.core.config import resolve_config, validate_config
from src.core.errors import UserError
from src.core.files import exclusive_lock
from src.core.run_folder import is_finished, read_yaml
from src.data import sources
from src.data.image_spec import MNIST_SPEC
from src.sweeps.runs import read_runs
from src.training.checkpoints import PARTS, drop_events_after, find_valid_checkpoint, sealed
from src.training.instantiate import instantiate_all
from src.training.predictor import load_predictor

TINY = (
    *("data=digits", "model.channels=[4,4,4,4,4,4]", "trainer.limit_train_batches=6", "trainer.max_epochs=1"),
    "callbacks.tensorboard=null",
)


class Trap:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY, "callbacks.resume.every_steps=3", f"hydra.run.dir={folder}"])
        train.main()
    return folder


@pytest.fixture
def stopped(run, tmp_path) -> Path:
    """The folder of a run that ended before its scores were written."""
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    return folder


def content(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_checkpoint_with_code_in_it_does_not_run(run_main, stopped, tmp_path):
    newest = stopped / "checkpoints/last.ckpt"
    checkpoint = torch.load(newest, weights_only=True)
    torch.save(checkpoint | {"loops": Trap(tmp_path / "ran")}, newest)
    torch.load(newest, weights_only=False)
    assert (tmp_path / "ran").exists()  # the trap works where it is let
    (tmp_path / "ran").unlink()
    result = run_main(f"resume={stopped}")
    assert result.code == 0 and "last.ckpt cannot be used: it holds more than tensors and plain values" in result.err
    assert not (tmp_path / "ran").exists()


FOREIGN = [
    "{_target_: os.system, command: touch ran}",
    "{_target_: builtins.exec}",
    "{_target_: subprocess.run}",
    "{_target_: hydra.utils.call}",
    "{_target_: hydra.utils.get_method}",
    "{_target_: src.cli.hydra_main.os.system, command: touch ran}",
    "{_target_: src.cli.hydra_main.shutil.rmtree}",
    "{_target_: src.cli.hydra_main.sys}",
    "{_target_: src.sweeps.callback.record_failure}",
    "{_target_: src.core.errors.say}",
    "{_target_: torch.load}",
    "{_target_: torch.hub.load}",
    "{_target_: torch.nn.os.system}",
    "{_target_: torch.nn.modules.module.torch.load}",
    "{_target_: lightning.pytorch.trainer.connectors.signal_connector.call}",
    "{_target_: '${oc.decode:os.system}'}",
    "{inner: [{_target_: os.system}]}",
    "[[{_target_: os.system}]]",
    "{_target_: torch.nn.Linear, _args_: [{_target_: os.system, _partial_: true}]}",
    "\"${oc.decode:'{_target_: os.system}'}\"",
    "{a: '${name}', _target_: [os.system]}",
]


@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("key", ["model", "callbacks", "trainer"])
def test_a_config_cannot_name_what_is_not_offered(foreign, key):
    config = OmegaConf.create(f"{{name: text, {key}: {{x: {foreign}}}}}")
    with pytest.raises(UserError, match="_target_="):
        validate_config(resolve_config(config))


def test_a_config_from_a_stranger_is_refused_before_anything_runs(run_main, stopped, monkeypatch):
    monkeypatch.chdir(stopped)
    file = stopped / ".hydra/config.yaml"
    file.write_text(file.read_text().replace("torch.optim.SGD", "os.system") + "\nhydra: {callbacks: {x: 1}}\n")
    before = content(stopped)
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "_target_=os.system" in result.err
    assert content(stopped) == before


def test_what_is_offered_is_found_without_importing_it():
    with pytest.raises(UserError, match=r"_target_=x\.y"):
        validate_config(
            resolve_config(OmegaConf.create("{a: [{_target_: torch.optim.Adam}], c: {_target_: '${d}'}, d: x.y}"))
        )
    validate_config(
        OmegaConf.create("{a: {_target_: src.models.cnn.CNN}, b: {_target_: lightning.pytorch.loggers.CSVLogger}}")
    )


def damaged(good: bytes, count: int):
    """`count` damaged forms: cut short, bits turned, bytes overwritten, pieces moved, emptied, lengthened in front."""
    rng = random.Random(0)
    yield b""
    for _ in range(count - 1):
        at, data = rng.randrange(len(good)), bytearray(good)
        kind = rng.randrange(5)
        if kind == 0:
            yield good[:at]
        elif kind == 1:
            data[at] ^= 1 << rng.randrange(8)
            yield bytes(data)
        elif kind == 2:
            data[at : at + 64] = rng.randbytes(len(data[at : at + 64]))
            yield bytes(data)
        elif kind == 3:
            yield good[at:] + good[:at]
        else:
            yield rng.randbytes(at % 99 + 1) + good[at % 99 :]


def test_damaged_idx_files_are_refused(mnist_root):
    good, count = content(mnist_root / "MNIST/raw"), 0
    for file, right in good.items():
        for wrong in damaged(right, 15):
            if wrong == right:
                continue
            file.write_bytes(wrong)
            with pytest.raises(UserError, match=file.name):
                sources.MNIST().load(mnist_root)
            count += 1
        file.write_bytes(right)
    assert count > 50 and sources.MNIST().load(mnist_root).train.images.shape == (40, 1, 28, 28)


def test_damaged_checkpoints_are_refused_or_harmless(stopped, capfd):
    """A turned bit may fall on one that means nothing, such as padding: then the checkpoint reads as before."""
    newest, before = stopped / "checkpoints/last.ckpt", stopped / "checkpoints/previous.ckpt"
    right, sound = newest.read_bytes(), before.read_bytes()
    expected = str(torch.load(newest, weights_only=True))
    refused = 0
    for wrong in damaged(right, 60):
        newest.write_bytes(wrong)
        found = find_valid_checkpoint(stopped)
        refused += found == before
        assert found == before or str(torch.load(newest, weights_only=True)) == expected
        assert before.read_bytes() == sound
    assert refused > 45 and capfd.readouterr().err.count("last.ckpt cannot be used") == refused


def test_damaged_configs_are_refused_in_one_line(run_main, stopped):
    """Or run, where what is changed is a comment, a name, or a number that is as good."""
    file = stopped / ".hydra/config.yaml"
    right, refused = file.read_bytes(), 0
    sound = content(stopped / "checkpoints")
    for wrong in damaged(right, 40):
        file.write_bytes(wrong)
        result = run_main(f"resume={stopped}", "hydra.job_logging=disabled")
        assert "Traceback" not in result.err
        if result.code == 0:
            (stopped / "metrics.json").unlink()
            continue
        assert result.code == 2 and result.err.splitlines()[-1].startswith("error: "), result.err
        assert content(stopped / "checkpoints") == sound
        refused += 1
    assert refused > 25


def test_a_foreign_network_is_refused_in_one_line(run_main, stopped):
    file = stopped / ".hydra/config.yaml"
    config = OmegaConf.load(file)
    config.model.channels[0] = 5
    OmegaConf.save(config, file)
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and "it is of a run with another config" in result.err and "Traceback" not in result.err
    assert "none of its checkpoints is sound" in result.err.splitlines()[-1]


def test_a_folder_that_cannot_be_written_is_one_line(run_main, tmp_path):
    (tmp_path / "file").touch()
    result = run_main(*TINY, f"hydra.run.dir={tmp_path / 'file/run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "hydra.run.dir" in result.err


def test_checksums_cover_what_pytorch_does_not_compare(stopped):
    newest = stopped / "checkpoints/last.ckpt"
    with zipfile.ZipFile(newest) as archive:
        name = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(newest.read_bytes())
    data[name.header_offset + name.file_size // 2 + 200] ^= 1
    newest.write_bytes(data)
    assert find_valid_checkpoint(stopped) == stopped / "checkpoints/previous.ckpt"


def test_the_checksums_of_mnist_are_the_published_ones():
    assert sum(size for size, _ in sources.MNIST_FILES.values()) == 54_950_048


def edited(folder: Path, text: str) -> None:
    """Puts keys into the config of a run."""
    file = folder / ".hydra/config.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(file), OmegaConf.create(text)), file)


@pytest.mark.parametrize(
    "text",
    [
        # Another value when it is built than when it was checked: seeding sets this variable in between.
        "{evil: {safe: src.data.datasets.Digits, '0': torch.load},"
        " data: {source: {_target_: '${evil.${oc.env:PL_GLOBAL_SEED,safe}}'}}}",
        "{name: 'x${oc.env:HOME}'}",
        "{name: '${oc.env:MNIST_ROOT,data}${oc.decode:1}'}",
        "{data: {root: '${oc.env:MY_SECRET}'}}",
        "{data: {root: '${oc.create:{a:1}}'}}",
        "{name: '${name}', data: {root: '${.${name}}'}}",
        "{name: '${hydra:job.name}'}",
        "{'${oc.env:HOME}': 1}",
        "{callbacks: {best: {dirpath: /somewhere/else}}}",
        "{callbacks: {last: {dirpath: '${output_dir}/../other/checkpoints'}}}",
        "{trainer: {default_root_dir: /tmp}}",
        "{logger: {tensorboard: {save_dir: http://127.0.0.1:9/}}}",
        "{callbacks: {best: {dirpath: 's3://bucket/x'}}}",
        "{logger: {x: {_target_: lightning.pytorch.loggers.MLFlowLogger, tracking_uri: 'http://127.0.0.1:9'}}}",
        "{callbacks: {best: {filename: ../../best}}}",
        "{callbacks: {best: {filename: /somewhere/else}}}",
        "{logger: {tensorboard: {name: ../other}}}",
        "{logger: {tensorboard: {version: /somewhere}}}",
        "{logger: {tensorboard: {sub_dir: ../../other}}}",
        "{callbacks: {x: {_target_: lightning.pytorch.callbacks.OnExceptionCheckpoint, dirpath: '${output_dir}/..'}}}",
        "{callbacks: {x: {_target_: lightning.pytorch.callbacks.SpikeDetection, exclude_batches_path: mine.json}}}",
        "{trainer: {profiler: {_target_: lightning.pytorch.profilers.SimpleProfiler, filename: ../x}}}",
        "{logger: {x: {_target_: lightning.pytorch.loggers.MLFlowLogger, tracking_uri: 'sqlite:////tmp/x.db'}}}",
        "{logger: {x: {_target_: lightning.pytorch.loggers.MLFlowLogger, artifact_location: 'file:/tmp/x'}}}",
        "{logger: {x: {_target_: lightning.pytorch.loggers.CometLogger, api_key: theirs}}}",
        "{logger: {x: {_target_: lightning.pytorch.loggers.WandbLogger, settings: {base_url: 'HTTP://127.0.0.1:9'}}}}",
        "{model: {_target_: torch.nn.Sequential, _args_: [{_target_: torch.serialization.load, f: x}]}}",
        "{model: {_target_: torch.nn.utils.rnn.os.system}}",
        "{data: {source: {_target_: src.data.datasets.Digits.__init__.__globals__}}}",
        "{model: {_target_: src.models.cnn.CNN, _partial_: true, _convert_: {_target_: os.system}}}",
        "{allowed: [os], model: {_target_: os.system}}",
        "{allowed: [subprocess], callbacks: {x: {_target_: subprocess.run}}}",
        "{callbacks: {best: {_target_: lightning.pytorch.callbacks.ModelCheckpoint, _args_: [weights]}}}",
        "{logger: {tensorboard: {name: 'x$MY_SECRET'}}}",
        "{callbacks: {best: {dirpath: '~/x'}}}",
        "{callbacks: {best: {dirpath: 'simplecache::http://127.0.0.1:9/x'}}}",
        "{logger: {tensorboard: {save_dir: 'filecache::http://127.0.0.1:9/x'}}}",
        "{logger: {x: {_target_: lightning.pytorch.loggers.MLFlowLogger, tracking_uri: ' http://127.0.0.1:9'}}}",
        "{trainer: {model_registry: theirs/model}}",
        "{data: {root: /nowhere/new}}",
        "{data: {reinforce: {_target_: src.distillation.soft_labels.SoftLabels, folder: /nowhere/answers}}}",
        "{data: {source: {_target_: src.data.datasets.TorchvisionDataset, dataset: USPS, download: true}}}",
        "{model: {_target_: src.sweeps.launcher.Worker, environment: {}}}",
        "{model: {_target_: src.core.process._Output, stream: null}}",
    ],
)
def test_a_strangers_config_looks_nothing_up_and_writes_nowhere_else(run_main, stopped, monkeypatch, text):
    monkeypatch.setenv("MY_SECRET", "secret")
    if "~" in text or "::" in text:
        monkeypatch.chdir(stopped)  # from where the path of such a text leads into the folder
    edited(stopped, text)
    before = content(stopped)
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "secret" not in result.err + result.out
    assert content(stopped) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda folder, other: (folder / "layers.txt").unlink() or (folder / "layers.txt").symlink_to(other / "file"),
        lambda folder, other: (folder / "mine").symlink_to(other),
        lambda folder, other: (folder / "mine").symlink_to("nowhere"),
        lambda folder, other: os.mkfifo(folder / "mine"),
        lambda folder, other: (folder / "train.log").unlink(missing_ok=True) or os.mkfifo(folder / "train.log"),
        lambda folder, other: (folder / "checkpoints/mine").symlink_to(other),
        lambda folder, other: (folder / "mine").hardlink_to(other / "file"),
    ],
)
def test_a_strangers_folder_leads_nowhere_else(run_main, stopped, tmp_path, make):
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").write_text("mine")
    make(stopped, tmp_path / "other")
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "no links" in result.err
    assert (tmp_path / "other/file").read_text() == "mine"


def test_a_checkpoint_that_was_changed_is_not_used(stopped):
    """Written again, a part of it emptied, or the same part of another checkpoint."""
    newest, before = stopped / "checkpoints/last.ckpt", stopped / "checkpoints/previous.ckpt"
    right, other = (torch.load(file, weights_only=True) for file in (newest, before))
    for part in PARTS:
        for wrong in right[part], type(right[part])(), other[part]:
            torch.save(right | {part: wrong}, newest)
            assert find_valid_checkpoint(stopped) == before


def test_a_network_that_does_not_fit_its_weights_takes_no_memory(small_weights, tmp_path):
    content = torch.load(small_weights, weights_only=True)
    model = {"_target_": "torch.nn.Linear", "in_features": 10**6, "out_features": 10**6}  # four terabytes
    torch.save(content | {"model": model}, tmp_path / "large.pt")
    with pytest.raises(UserError, match="do not fit the model"):
        load_predictor(tmp_path / "large.pt")


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"x": torch.zeros(1).expand(100_000, 100_000)}},  # 40 GB
        {"state_dict": {"x": torch.sparse_coo_tensor(size=(100_000, 100_000))}},
        {"state_dict": {}, "model": {"_target_": "torch.nn.ZeroPad2d", "padding": 50_000}},
        {"data": MNIST_SPEC.to_dict() | {"shape": [1, 100_000, 100_000]}},
        {"data": MNIST_SPEC.to_dict() | {"std": [float("nan")]}},
    ],
)
def test_weights_that_unfold_take_no_memory(small_weights, tmp_path, content):
    torch.save(torch.load(small_weights, weights_only=True) | content, tmp_path / "large.pt")
    with pytest.raises(UserError, match=r"larger than the file|plain numbers|a result of shape|says of its images"):
        load_predictor(tmp_path / "large.pt")


@pytest.mark.parametrize("path", ["{}/../../mine", "{}/../../mine/..", "http://127.0.0.1:9/mine", "/somewhere/mine"])
def test_a_checkpoint_has_nothing_deleted_elsewhere(run_main, stopped, tmp_path, path):
    """ModelCheckpoint deletes what its state calls the best so far, once there is a better one."""
    (tmp_path / "mine").mkdir()
    newest = stopped / "checkpoints/previous.ckpt"
    (stopped / "checkpoints/last.ckpt").unlink()
    checkpoint = torch.load(newest, weights_only=True)
    state = next(state for name, state in checkpoint["callbacks"].items() if name.startswith("ModelCheckpoint"))
    worst, path = torch.tensor(-1.0), path.format(stopped / "checkpoints")
    state |= {"best_model_score": worst, "kth_value": worst, "best_k_models": {path: worst}}
    state |= {"kth_best_model_path": path, "best_model_path": path, "dirpath": str(stopped / "checkpoints")}
    newest.write_bytes(sealed(checkpoint, checkpoint["run"]))
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and "the checkpoint names" in result.err and len(result.err.splitlines()) == 1
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("length", [1, 2**45])
def test_a_record_of_no_event_ends_the_curve(stopped, length):
    """One that is nothing of TensorBoard's, and one that says it is of 35 terabytes."""
    header = struct.pack("<Q", length)
    *_, events = sorted(stopped.glob("events*"))
    content = header + struct.pack("<I", masked_crc32c(header)) + b"\xff" + struct.pack("<I", masked_crc32c(b"\xff"))
    good = events.read_bytes()
    events.write_bytes(good + content)
    drop_events_after(stopped, 10**6)
    assert events.read_bytes() == good


@pytest.mark.parametrize("number", ["1" + ":1" * 300 + ":1.0", "1" + ":1" * 400_000, "0x" + "f" * 9999])
def test_numbers_without_end_in_a_config_are_refused(tmp_path, number):
    (tmp_path / "config.yaml").write_text(f"seed: {number}")
    with pytest.raises(UserError, match="cannot be read"):
        read_yaml(tmp_path / "config.yaml")


NOT_RESULTS = (
    *("", "[]", "3", "null", "{", '{"metrics": 1}', '{"metrics": {}}', '{"metrics": {"a": "b"}, "seconds": {}}'),
    *('{"metrics": {"a": null}, "seconds": {}}', '{"metrics": [], "seconds": []}', "[" * 9999, "\xff"),
    '{"metrics": {"a": 1' + "0" * 400 + '}, "seconds": {}}',
)


def test_a_damaged_job_is_named_and_the_others_are_reported(run_main, stopped):
    sweep = stopped.parent / "sweep"
    for name in "ab":
        shutil.copytree(stopped, sweep / name)
        results = {"data": "digits", "epochs": 1, "metrics": {"val/acc": 0.5}, "seconds": {"fit": 1.0}}
        (sweep / name / "metrics.json").write_text(json.dumps(results))
    for text in NOT_RESULTS:
        (sweep / "b/metrics.json").write_text(text, encoding="latin-1")
        with pytest.raises(UserError, match="delete it, and the run can be finished"):
            is_finished(sweep / "b")
        assert [job.status for job in read_runs([sweep])] == ["finished", "damaged"]
    overrides = (sweep / "b/.hydra/overrides.yaml").read_text()
    (sweep / "b/.hydra/overrides.yaml").write_text("- data")  # cut short: no override any more
    (sweep / "multirun.yaml").write_text("hydra: {overrides: {task: ['seed=1,2'], hydra: []}}")
    assert [job.status for job in read_runs([sweep])] == ["finished", "damaged", *["not begun"] * 2]
    (sweep / "multirun.yaml").unlink()
    (sweep / "b/.hydra/overrides.yaml").write_text(overrides)
    result = run_main(sweep, main=report.main)
    assert result.code == 1 and len(result.err.splitlines()) == 1 and "b/metrics.json" in result.err
    assert "1 run: 1 finished" in result.out and "Damaged: 1" in result.out
    shutil.rmtree(sweep / "a")
    result = run_main(sweep, main=report.main)
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "b/metrics.json" in result.err


def test_a_config_that_grows_without_end_is_refused(run_main, stopped):
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))]
    (stopped / ".hydra/config.yaml").write_text("\n".join(lines))
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and "refers to its own parts" in result.err and len(result.err.splitlines()) == 1


def test_an_edited_config_does_not_go_with_its_checkpoints(run_main, stopped):
    edited(stopped, "{optimizer: {lr: 0.2}}")
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and "it is of a run with another config" in result.err


def test_one_command_continues_one_run(run_main, tmp_path):
    result = run_main(f"resume={tmp_path / 'a'}", f"resume={tmp_path / 'b'}")
    assert result.code == 2 and "name one run" in result.err and len(result.err.splitlines()) == 1


def test_a_moved_folder_is_finished_and_knows_its_best(run_main, stopped, tmp_path):
    moved = stopped.rename(tmp_path / "moved")
    result = run_main(f"resume={moved}")
    assert result.code == 0, result.err
    assert json.loads((moved / "metrics.json").read_text())["best_epoch"] == 1


def test_who_comes_too_late_takes_nothing_away(run_main, tmp_path, monkeypatch):
    """Two runs are begun together in a folder that neither of them found there."""
    monkeypatch.setattr(entry, "content", lambda folder: set())
    folder = tmp_path / "run"
    folder.mkdir()
    with exclusive_lock(folder):
        result = run_main(*TINY, f"hydra.run.dir={folder}")
    assert result.code == 2 and "another process is at work" in result.err and (folder / ".hydra/config.yaml").exists()


def test_a_run_is_one_process_at_a_time(run_main, stopped):
    with exclusive_lock(stopped):
        result = run_main(f"resume={stopped}")
    assert result.code == 2 and "another process is at work" in result.err and len(result.err.splitlines()) == 1
    assert run_main(f"resume={stopped}").code == 0


MISTAKES = "optimizer.lr=-1", "data.val_size=5000", "+optimizer.nope=1", "optimized_metric=val/nope", "data.val_size=0"


@pytest.mark.parametrize("mistake", MISTAKES)  # said when it is read, built, by a library, before the first batch
def test_a_mistake_takes_what_it_made_and_nothing_that_was_there(run_main, tmp_path, mistake):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/.gitkeep").touch()
    (tmp_path / "mine/link").symlink_to("nowhere")
    (tmp_path / "mine/events.out.tfevents.1").touch()
    before = set((tmp_path / "mine").rglob("*"))
    for folder in "mine", "new":
        assert run_main(*TINY, f"hydra.run.dir={tmp_path / folder}", mistake).code == 2
    assert set((tmp_path / "mine").rglob("*")) == before and not (tmp_path / "new").exists()


def test_a_folder_that_holds_a_run_is_not_used_again(run_main, stopped):
    before = content(stopped)
    result = run_main(*TINY, "seed=2", f"hydra.run.dir={stopped}")
    assert result.code == 2 and "holds a run; continue it with resume=" in result.err
    assert content(stopped) == before


def test_a_run_outlives_the_reader_of_its_output(tmp_path):
    command = [sys.executable, "-m", "src.train", *TINY, f"hydra.run.dir={tmp_path / 'run'}"]
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as run:
        run.stdout.readline()
        run.stdout.close()
    assert run.returncode == 0 and (tmp_path / "run/metrics.json").exists()


def test_a_packed_file_is_not_unpacked(stopped):
    newest = stopped / "checkpoints/last.ckpt"
    with zipfile.ZipFile(newest) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(newest, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    with pytest.raises(UserError, match="it is packed"):
        load_predictor(newest)
    assert find_valid_checkpoint(stopped) == stopped / "checkpoints/previous.ckpt"


def test_weights_that_are_not_finite_are_refused(stopped):
    newest = stopped / "checkpoints/last.ckpt"
    checkpoint = torch.load(newest, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).fill_(float("nan"))
    torch.save(checkpoint, newest)
    with pytest.raises(UserError, match="not finite"):
        load_predictor(newest)
    assert find_valid_checkpoint(stopped) == stopped / "checkpoints/previous.ckpt"


def test_names_of_files_forge_no_lines(run_main, tmp_path):
    (tmp_path / "a\nerror: all is lost\x1b[31m.png").write_bytes(b"")
    result = run_main(tmp_path, main=predict.main)
    assert len(result.err.splitlines()) == 1 and "\x1b" not in result.err and result.code == 2


@pytest.mark.parametrize(("key", "target"), [("callbacks", "src.models.cnn.CNN"), ("logger", "torch.nn.Identity")])
def test_what_is_no_callback_and_no_logger_is_refused_before_the_training(key, target):
    with pytest.raises(UserError, match=f"{key}.x: .* is no (Callback|Logger) of Lightning's"):
        instantiate_all(key, {"x": {"_target_": target, **({"dropout": 0.0} if "CNN" in target else {})}})


def test_names_of_classes_forge_no_lines(small_weights, tmp_path):
    names = ["a\nerror: all is lost\x1b[31m", *"123456789"]
    content = torch.load(small_weights, weights_only=True)
    torch.save(content | {"data": content["data"] | {"classes": names}}, tmp_path / "some.pt")
    assert load_predictor(tmp_path / "some.pt").spec.classes[0] == "a\\nerror: all is lost\\x1b[31m"
