"""Files from strangers and damaged files are refused in one line; no code in them runs, nothing is overwritten."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from omegaconf import OmegaConf

from src.core.config import resolve_and_validate
from src.core.errors import UserError
from src.core.files import exclusive_lock
from src.data import datasets


class Trap:
    """Pickles into a call that creates a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture
def stopped(finished_run, tmp_path) -> Path:
    """The folder of a run that was stopped before its metrics were written."""
    folder = shutil.copytree(finished_run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    return folder


def read_files(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_checkpoint_with_code_in_it_does_not_run_it(run_main, stopped, tmp_path):
    file = stopped / "checkpoints/last.ckpt"
    torch.save(torch.load(file, weights_only=True) | {"loops": Trap(tmp_path / "trapped")}, file)
    torch.load(file, weights_only=False)
    assert (tmp_path / "trapped").exists()  # the trap works
    (tmp_path / "trapped").unlink()
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and "last.ckpt" in result.err and "more than tensors and plain values" in result.err
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("target", ["os.system", "torch.load"])
def test_config_of_a_run_folder_that_names_a_function_is_refused(run_main, stopped, target):
    config = stopped / ".hydra/config.yaml"
    config.write_text(config.read_text().replace("src.models.cnn.CNN", target))
    before = read_files(stopped)
    result = run_main(f"resume={stopped}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and f"_target_={target}" in result.err
    assert read_files(stopped).keys() == before.keys()


@pytest.mark.parametrize(
    "node",
    [
        "{_target_: builtins.exec}",
        "{_target_: src.cli.hydra_main.os.system}",
        "{_target_: src.cli.hydra_main.CheckCommand}",
        "{_target_: torch.hub.load}",
        "{_target_: torch.nn.modules.module.torch.load}",
        "{_target_: '${name}', name: os.system}",
        "[[{_target_: os.system}]]",
        "{_target_: torch.nn.Linear, _args_: [{_target_: os.system, _partial_: true}]}",
        "{_target_: src.models.cnn.CNN, _convert_: {_target_: os.system}}",
        "\"${oc.decode:'{_target_: os.system}'}\"",
    ],
)
def test_target_outside_the_allow_list_is_refused(node):
    with pytest.raises(UserError, match="_target_="):
        resolve_and_validate(OmegaConf.create(f"{{name: os.system, model: {{x: {node}}}}}"))


def make_damaged(content: bytes, count: int):
    """Yield damaged copies: empty, cut short, a bit flipped, bytes overwritten, parts swapped."""
    rng = random.Random(0)
    yield b""
    for number in range(count - 1):
        position, damaged = rng.randrange(len(content)), bytearray(content)
        match number % 4:
            case 0:
                del damaged[position:]
            case 1:
                damaged[position] ^= 1 << rng.randrange(8)
            case 2:
                damaged[position : position + 64] = rng.randbytes(64)
            case 3:
                damaged = damaged[position:] + damaged[:position]
        yield bytes(damaged)


def test_damaged_mnist_files_are_refused_by_name(mnist_root):
    for file, content in read_files(mnist_root / "MNIST/raw").items():
        for damaged in make_damaged(content, 9):
            file.write_bytes(damaged)
            if damaged != content:
                with pytest.raises(UserError, match=file.name):
                    datasets.MNIST().load(mnist_root)
        file.write_bytes(content)
    assert datasets.MNIST().load(mnist_root).train.images.shape == (40, 1, 28, 28)


def test_run_folder_is_used_by_one_process_at_a_time(run_main, stopped):
    with exclusive_lock(stopped):
        result = run_main(f"resume={stopped}")
    assert result.code == 2 and "another process" in result.err and len(result.err.splitlines()) == 1
    assert run_main(f"resume={stopped}").code == 0


@pytest.mark.slow
def test_closed_stdout_ends_a_run_without_a_traceback(tmp_path):
    command = [sys.executable, "-m", "src.train", *SMALL, f"hydra.run.dir={tmp_path / 'run'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()
    assert process.returncode in (0, 1)  # 0 if everything was printed before the pipe was closed
