"""What a run, a mistake and --help print."""

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
from conftest import SMALL
from hydra.core.override_parser.overrides_parser import OverridesParser

from src.cli.hydra_main import _quote
from src.core.config import CONF, ROOT

BLOCKS = "conv1", "conv2", "conv3", "gap", "fc"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(run_main, monkeypatch):
    """Run a main with a terminal as its output; return the lines that stay on it."""

    def run(*arguments: object) -> list[str]:
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        for name, value in ("COLUMNS", "80"), ("LINES", "50"):
            monkeypatch.setenv(name, value)
        run_main(*arguments)
        assert "%|" in screen.getvalue()
        return re.sub(r"\r[^\r\n]*(?=\r)|\r", "", screen.getvalue()).splitlines()  # without the states of the bar

    return run


def test_run_on_a_terminal_prints_epoch_lines_and_next_commands(terminal, tmp_path):
    lines = terminal(*SMALL, f"hydra.run.dir={tmp_path / 'run'}")
    scores = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert re.match("digits: 1,287 training, 150 validation; 1 × cpu, 1 thread, 32-true; seed 0; .*/run$", lines[0])
    assert [line.split()[0] for line in lines[1:8]] == ["layer", "net", *(f"net.{name}" for name in BLOCKS)]
    assert (tmp_path / "run/layers.txt").read_text(encoding="utf-8").count("BatchNorm2d") == 6
    epochs = [line for line in lines if line.startswith("epoch")]
    assert [line.split("  ")[0] for line in epochs] == ["epoch 1/2", "epoch 2/2"]
    assert len({len(line) for line in epochs}) == 1 and all(re.search(r" \d+\.\d s$", line) for line in epochs)
    assert f"train acc {100 * scores['train/acc']:.2f}%" in epochs[1]  # of its own epoch, also the last
    assert f"val acc {100 * scores['val/acc']:.2f}%" in epochs[1]
    assert not any("%|" in line for line in lines)  # the bar is gone
    wide = [line for line in lines if len(line) > 80 and str(tmp_path.name) not in line]
    assert not wide
    assert any(re.match(r"time +\d+\.\d s, [\d,]+ samples/s$", line) for line in lines)
    assert re.match(r"next +(python -m src.evaluate|tensorboard --logdir) ", lines[-1])


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["optimizer.lr=0.1,0.2"], "add --multirun"),
        (["model.channels=[16,", "16]"], "no viable alternative at input '[16,'"),
        (["~optimizer.momentun"], "optimizer.momentun: no such key"),
        (["optimizer=5"], "as logger=none"),
        (["optimizer.fused=true"], "optimizer.fused: no such key"),
        (["model@net=cnn"], "did you mean model?"),
        (["-m", "optimizer.rl=1,2"], "did you mean optimizer.lr?"),
        (["+foo.bar=1"], "foo.bar: no such key"),
        (["logger=[tensorboard,foo]"], "Could not load 'logger/foo'"),
        (["--config-name=foo"], "Cannot find primary config 'foo'"),
        (["trainer.precision=oops"], "trainer: Precision 'oops' is invalid"),
        (["+trainer.callbacks=[]"], "must be null"),
        (["output_dir=elsewhere"], "hydra.run.dir=… sets the folder"),
    ],
)
def test_typo_prints_one_line(run_main, tmp_path, arguments, words):
    result = run_main(*SMALL, *arguments, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and result.err.startswith("error: ") and words in result.err
    assert len(result.err.splitlines()) == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "content, words",
    [
        (b"optimizer:\n  lr: [0.1\nname: x", "own.yaml, line 5: expected ',' or ']'"),
        (b"optimizer:\n\tlr: 0.1", "own.yaml, line 4: found character '\\t'"),
        (b"optimzer:\n  lr: 0.1", "optimzer.lr: no such key; did you mean optimizer.lr?"),
        (b"optimizer.lr: 0.1", "optimizer.lr: write nested keys"),
        (b"seed: 3", "the first line of its file must be # @package _global_"),
        (b"defaults:\n  - override /modle: cnn", "conf/experiment/own.yaml: modle: no such key; did you mean model?"),
    ],
)
def test_damaged_config_is_named_with_its_line(run_main, tmp_path, content, words):
    (tmp_path / "experiment").mkdir()
    header = b"# @package _global_\n\n" if content != b"seed: 3" else b""
    (tmp_path / "experiment/own.yaml").write_bytes(header + content)
    result = run_main("--config-dir", tmp_path, "experiment=own", f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and words in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, value",
    [
        ("hydra.run.dir=a b (1), 50% $x {off} it's=new #1\\", "a b (1), 50% $x {off} it's=new #1\\"),
        ("hydra.run.dir=x/${name}_s${seed}", "x/${name}_s${seed}"),
        ("resume='quoted'", "quoted"),
        ("data.root=~/pets", os.path.expanduser("~/pets")),
        ("data.root=/x/käse", "/x/käse"),
        ("name=Übung", "Übung"),
        ("name=my pets (1)", "my pets (1)"),
        ("optimizer.groups.x={pattern: '(?!.*fc)', lr: 1}", {"pattern": "(?!.*fc)", "lr": 1}),
        ("seed=range(3)", [0, 1, 2]),
    ],
)
def test_paths_and_names_are_taken_as_typed(override, value):
    parsed = OverridesParser.create().parse_override(_quote(override))
    values = [getattr(item, "text", item) for item in parsed.sweep_iterator()] if parsed.is_sweep_override() else None
    assert (values or parsed.value()) == value


def test_parts_that_do_not_fit_print_one_line_and_make_no_folder(run_main, tmp_path):
    parts = "~model", "+model={_target_:torch.nn.MaxPool1d,kernel_size:2}", "data=digits"
    result = run_main(*parts, f"hydra.run.dir={tmp_path / 'run'}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "experiment= that sets both" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "start, fix",
    [
        (["-S", "-m", "src.train"], "make train installs them"),  # without site-packages
        (["-S", "src/train.py"], "python -m src.train"),
        (["src/train.py", "data=digits"], "python -m src.train"),
    ],
)
def test_wrong_start_names_the_right_one(start, fix):
    result = subprocess.run([sys.executable, *start], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and len(result.stderr.splitlines()) <= 2 and fix in result.stderr.splitlines()[0]


def test_help_prints_recipes_groups_and_keys(run_main):
    result = run_main("--help")
    assert result.code == 0
    for experiment in (CONF / "experiment").glob("*.yaml"):
        assert re.search(rf"^  {experiment.stem}\b", result.out, re.M)  # an own one may lack a comment
    assert re.search(r"^seed: 0 +# int ≥ 0; determines initial weights", result.out, re.M)
    assert run_main("--version").out == "digitlab 0.1.0\n"
    assert re.search(r"^  optimizer +adamw gradient_descent muon sgd$", result.out, re.M)


@pytest.mark.slow
@pytest.mark.parametrize("shell", [["bash", "--norc", "-i"], ["zsh", "-f", "-i"]], ids=["bash", "zsh"])
def test_tab_completes_keys_and_options(shell):
    if not shutil.which(shell[0]):
        pytest.skip(f"{shell[0]} is not installed")
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
