import csv
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import lightning as L
import numpy as np
import pytest
import torch
from conftest import SimulatedKill, read_outcome
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.backprop import network, stability, workbook
from src.backprop.__main__ import main as lesson_main
from src.backprop.datamodule import OneSampleDataModule
from src.backprop.network import (
    INPUTS,
    NAMES,
    TARGETS,
    WEIGHTS,
    BackpropModule,
    BackpropNet,
    GradientDescent,
    Values,
    equations,
    forward,
)
from src.backprop.stability import RATES, START, compute_step, descend, make_lesson

DOCS = Path(__file__).parents[2] / "docs"


# The gradients of the first step, and the 100th losses at RATES.
FIRST_GRADIENTS = [
    *("3.169933959e-04", "6.339867918e-04", "3.517763216e-04", "7.035526432e-04"),
    *("1.288081863e-02", "1.297608491e-02", "1.540834828e-02", "1.552230812e-02"),
]
HUNDREDTH = [
    *("7.89511004703e-03", "4.28219947921e-03", "6.34491813404e-04"),
    *("8.98639508725e-05", "2.40940031281e-05", "2.91081437337e-08"),
]
HUNDREDTH_SPREADSHEET = [
    *(0.00789510955380245, 0.004282199279049759, 0.0006344919518904643),
    *(8.986400368291554e-05, 2.4094023617010203e-05, 2.9108209513535805e-08),
]


def train(gradients, lr, net=None, inputs=INPUTS, targets=TARGETS):
    """Train 100 steps with Lightning; return the rows."""
    module = BackpropModule(net or BackpropNet(), lambda params: GradientDescent(params, lr=lr), gradients=gradients)
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_checkpointing", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=100, **off)
    trainer.fit(module, OneSampleDataModule(inputs, targets))
    return module.rows


@pytest.fixture(scope="module")
def losses():
    """Return the 600 losses of each gradient function, by learning rate."""
    return {
        gradients: {lr: [row["E_total"] for row in train(gradients, lr)] for lr in RATES}
        for gradients in ("autograd", "equations", "spreadsheet")
    }


def find_largest_difference(losses, gradients, reference):
    return np.abs(np.subtract(*([*losses[name].values()] for name in (gradients, reference)))).max()


def test_first_step_has_published_loss_and_gradients():
    row = compute_step(START).to_row()
    assert row["E_total"] == 0.014181377937891659
    assert [f"{row[f'dE_dw{n}']:.9e}" for n in range(1, 9)] == FIRST_GRADIENTS


def test_losses_of_equations_and_autograd_are_the_published_ones(losses):
    for gradients in ("autograd", "equations"):
        assert {len(values) for values in losses[gradients].values()} == {100}
        assert [f"{values[99]:.11e}" for values in losses[gradients].values()] == HUNDREDTH
    assert find_largest_difference(losses, "equations", "autograd") <= 1e-15


def test_spreadsheet_losses_are_the_published_ones(losses):
    assert [values[99] for values in losses["spreadsheet"].values()] == HUNDREDTH_SPREADSHEET
    assert 5e-10 < find_largest_difference(losses, "spreadsheet", "equations") < 6e-10  # the effect of the bug


@pytest.mark.parametrize("seed", range(20))
def test_equations_match_autograd_and_finite_differences(seed):
    generator = torch.Generator().manual_seed(seed)
    weights, inputs = (size * torch.randn(n, generator=generator, dtype=torch.float64) for size, n in ((3, 8), (2, 2)))
    targets = torch.rand(2, generator=generator, dtype=torch.float64)

    def compute(w, bug=False):
        sample = dict(zip(("i1", "i2", "t1", "t2"), (*inputs, *targets), strict=True))
        return equations(forward(Values(bug=bug, **sample, **dict(zip(NAMES, w, strict=False)))))

    def error(w):
        return compute(w).E_total

    def gradients(v):
        return torch.stack([getattr(v, f"dE_dw{n}") for n in range(1, 9)])

    by_autograd, by_hand = torch.func.grad(error)(weights), gradients(compute(weights))
    step = 1e-5  # the truncation error is of the order of step², the rounding error of 1e-16 / step
    by_difference = torch.stack(
        [(error(weights + step * unit) - error(weights - step * unit)) / (2 * step) for unit in torch.eye(8).double()]
    )
    torch.testing.assert_close(by_hand, by_autograd, atol=1e-12, rtol=0)
    torch.testing.assert_close(by_hand, by_difference, atol=1e-9, rtol=0)
    assert (gradients(compute(weights, bug=True)) != by_hand).nonzero().flatten().tolist() == [2, 3]


@pytest.mark.parametrize("train_bias", [False, True])
def test_biases_of_the_well_known_example_match_pytorch(train_bias):
    rows = train("equations", 0.5, BackpropNet(WEIGHTS, [0.35, 0.6], train_bias), targets=(0.01, 0.99))
    w = torch.tensor(WEIGHTS, dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.35, 0.6], dtype=torch.float64, requires_grad=train_bias)
    targets = torch.tensor([0.01, 0.99], dtype=torch.float64)
    optimizer = torch.optim.SGD([w, b] if train_bias else [w], lr=0.5)
    for row in rows:
        optimizer.zero_grad()
        hidden = torch.sigmoid(w[:4].view(2, 2) @ torch.tensor(INPUTS, dtype=torch.float64) + b[0])
        loss = ((torch.sigmoid(w[4:].view(2, 2) @ hidden + b[1]) - targets) ** 2).sum() / 2
        loss.backward()
        names = NAMES if train_bias else NAMES[:8]
        gradients = torch.cat([w.grad, b.grad]) if train_bias else w.grad
        assert [row[f"dE_d{name}"] for name in names] == pytest.approx(gradients.tolist(), abs=1e-12, rel=0)
        assert [row["E_total"], row["b1"], row["b2"]] == pytest.approx([loss.item(), *b.tolist()], abs=1e-12, rel=0)
        optimizer.step()
    assert f"{rows[0]['E_total']:.9f}" == "0.298371109"  # as published


@pytest.mark.parametrize("gradients", ["equations", "spreadsheet"])
def test_vectorised_descent_equals_training(losses, gradients):
    curves, _ = descend(torch.tensor(RATES, dtype=torch.float64), 100, bug=gradients == "spreadsheet")
    np.testing.assert_allclose(curves, [*losses[gradients].values()], atol=1e-15, rtol=0)


def test_scan_finds_the_learning_rates_at_which_the_loss_rises_and_sticks():
    study = stability.scan_learning_rates()
    assert study.limit < study.first_rise < study.stuck
    assert study.flatter > 500 > study.limit  # otherwise η = 500 could not stay at its minimum
    assert (study.losses[study.rates >= study.stuck, -1] > 0.249).all()
    rates = torch.tensor([0.9 * study.first_rise, study.first_rise], dtype=torch.float64)
    below, above = descend(rates, 2)[0]
    assert below[1] < below[0] and above[1] > above[0]
    assert study.losses[-1, -1].item() == pytest.approx(0.25)  # both outputs are 0: two errors of ½ · 0.5²


@pytest.fixture
def run(run_main):
    def run_backprop(*arguments):
        result = run_main(*arguments, "experiment=backprop")
        assert result.code == 0, result.err
        return result

    return run_backprop


def read_csv(file):
    with file.open() as stream:
        return list(csv.DictReader(stream))


def test_run_writes_trace_scalars_and_worked_step(run, tmp_path, losses):
    result = run(f"hydra.run.dir={tmp_path}", "optimizer.lr=0.8", "task.gradients=spreadsheet")

    rows = read_csv(tmp_path / "trace.csv")
    assert list(rows[0]) == ["step", *compute_step(START, η=0.5, bug=False).to_row()]
    assert "w8" in rows[0] and "dE_dh2" in rows[0] and not {"b1", "dE_db1"} & {*rows[0]}
    assert [int(row["step"]) for row in rows] == list(range(1, 101))
    assert [float(row["E_total"]) for row in rows] == losses["spreadsheet"][0.8]
    assert [float(rows[0][f"w{n}"]) for n in range(1, 9)] == list(WEIGHTS)
    first, last = losses["spreadsheet"][0.8][0], losses["spreadsheet"][0.8][-1]
    assert f"η = 0.8: loss 1 is {first:.8e}, loss 100 is {last:.8e}" in result.out
    assert "trace.csv" in result.out
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert metrics["loss/E_total"] == HUNDREDTH_SPREADSHEET[RATES.index(0.8)]

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    groups = {"loss": 1, "error": 2, "neuron": 8, "weight": 8, "gradient": 14}
    tags = [tag for tag in events.Tags()["scalars"] if tag.partition("/")[0] in groups]
    assert {group: sum(tag.startswith(f"{group}/") for tag in tags) for group in groups} == groups
    for tag in tags:
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == list(range(100))
        assert [scalar.value for scalar in scalars] == [np.float32(row[tag.partition("/")[2]]) for row in rows]
    (text,) = events.Tensors("first_step/text_summary")
    step = text.tensor_proto.string_val[0].decode()
    assert "| a_h1 | σ(h1) | σ(0.0275) | 0.5068745668 |" in step
    assert "| δ_h2 | ∂E/∂a_h2·a_h1·(1 − a_h1) |" in step  # the bug, which task.gradients=spreadsheet asks for


def test_large_gradients_are_not_clipped(run, tmp_path):
    run(f"hydra.run.dir={tmp_path}", "data.targets=[-50,80]", "optimizer.lr=0.1", "trainer.max_epochs=2")
    first, second = read_csv(tmp_path / "trace.csv")
    assert float(first["dE_dw7"]) < -5
    for n in range(1, 9):
        assert float(second[f"w{n}"]) == float(first[f"w{n}"]) - 0.1 * float(first[f"dE_dw{n}"])


@pytest.mark.slow
def test_sweep_writes_losses_plots_and_workbook(run, tmp_path, losses):
    result = run("sweep=backprop_lr", f"hydra.sweep.dir={tmp_path}")
    names = [f"optimizer.lr={lr}" for lr in RATES]
    assert {path.parent.name for path in tmp_path.glob("*/trace.csv")} == {*names}
    rows = read_csv(tmp_path / "losses.csv")
    assert list(rows[0]) == ["step", *names] and rows[0]["step"] == "1"
    assert {lr: [float(row[f"optimizer.lr={lr}"]) for row in rows] for lr in RATES} == losses["equations"]
    assert "| optimizer.lr=2.0 | 1.41813779e-02 | 4.65371862e-03 | 2.31691942e-05 | 2.91081437e-08 |" in result.out
    with zipfile.ZipFile(tmp_path / "backprop.xlsx") as book:
        start = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    cells = {cell.get("r"): cell[0].text for cell in start.iter() if cell.tag.endswith("}c") and len(cell)}
    assert float(cells["B22"]) == 0.5  # of the six learning rates, that of docs/backprop.md


@pytest.mark.slow
def test_sweep_over_two_keys_names_losses_by_run(run, tmp_path):
    run("-m", f"hydra.sweep.dir={tmp_path}", "optimizer.lr=0.5,1.0", "trainer.max_epochs=2,3")
    rows = read_csv(tmp_path / "losses.csv")
    assert len(rows) == 3 and len(rows[0]) == 5
    shorter = [name for name in rows[0] if "max_epochs=2" in name]
    assert [name for name, value in rows[2].items() if value == ""] == shorter


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0", "optimizer.lr=0: must be"),
        ("optimizer.lr=fast", "optimizer.lr=fast: must be"),
        ("model.weights=[0.1,0.2]", "model.weights=[0.1, 0.2]: must be list of 8 × float"),
        ("model.weights=[1,2,3,4,5,6,7,nan]", "must be list of 8 × float"),
        ("model.bias=[0.1]", "model.bias=[0.1]: must be list of 2 × float or null"),
        ("data.inputs=[1,2,3]", "data.inputs=[1, 2, 3]: must be list of 2 × float"),
        ("data.targets=[0.5,inf]", "data.targets=[0.5, inf]: must be list of 2 × float"),
        ("task.gradients=guess", "must be one of autograd, equations, spreadsheet"),
        ("model=cnn", "experiment=backprop without model="),
        ("task=classification", "data=backprop has no images"),
    ],
)
def test_mistake_prints_one_line_and_leaves_no_folder(run_main, tmp_path, override, message):
    result = run_main("experiment=backprop", f"hydra.run.dir={tmp_path}/run", override)
    assert result.code == 2
    (line,) = result.err.splitlines()
    assert line.startswith("error: ") and message in line
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not shutil.which("soffice"), reason="LibreOffice (soffice) is not installed")
@pytest.mark.parametrize("gradients, lr, bias", [("equations", 0.8, None), ("spreadsheet", 2.0, [0.35, 0.6])])
def test_libreoffice_recalculates_workbook(tmp_path, gradients, lr, bias):
    # The stored results belong to another learning rate than the formulas, so reading without recalculating fails.
    stale, right = (train(*run, BackpropNet(bias=bias)) for run in (("equations", 0.1), (gradients, lr)))
    rows = [right[0] | {name: stale[0][name] for name in ("h1", "E_total", "dE_dw1")}, *stale[1:]]
    workbook.write_workbook(tmp_path / "sheet.xlsx", rows, {"0.1": [row["E_total"] for row in stale]})
    settings = tmp_path / "profile/user/registrymodifications.xcu"
    settings.parent.mkdir(parents=True)
    settings.write_text(  # recalculate on load: 0, always
        '<oor:items xmlns:oor="http://openoffice.org/2001/registry">'
        '<item oor:path="/org.openoffice.Office.Calc/Formula/Load">'
        '<prop oor:name="OOXMLRecalcMode" oor:op="fuse"><value>0</value></prop></item></oor:items>'
    )
    # Every sheet, with unformatted cells.
    as_csv = "csv:Text - txt - csv (StarCalc):44,34,76,1,,0,false,false,false,false,false,-1"
    subprocess.run(
        [
            *("soffice", f"-env:UserInstallation={settings.parents[1].as_uri()}", "--headless"),
            *("--convert-to", as_csv, "--outdir", tmp_path, tmp_path / "sheet.xlsx"),
        ],
        check=True,
        capture_output=True,
    )
    with (tmp_path / f"sheet-{workbook.STEPS_SHEET}.csv").open() as file:
        rows = list(csv.reader(file))[workbook.HEADER + 1 :]
    calculated = np.array([[float(cell) for cell in row[1:]] for row in rows])
    np.testing.assert_allclose(calculated, [[*row.values()] for row in right], atol=1e-12, rtol=0)
    with (tmp_path / "sheet-losses.csv").open() as file:
        live = [float(row[2]) for row in list(csv.reader(file))[1:]]
    np.testing.assert_allclose(live, [row["E_total"] for row in right], atol=1e-12, rtol=0)


def test_lesson_quotes_the_numbers_and_plots_of_its_command(tmp_path, capsys):
    make_lesson(tmp_path)
    printed = capsys.readouterr().out
    lesson = (DOCS / "backprop.md").read_text()
    images = set(re.findall(r"\]\((\w+\.png)\)", lesson))
    assert {file.name for file in tmp_path.glob("*.png")} == images - {"backprop_network.png", "backprop_path.png"}
    assert all((DOCS / name).is_file() for name in images)
    for line in printed.splitlines():
        quotes = [line] if line.startswith("|") else re.findall(r"\d+(?:\.\d+)?(?:e[-+]\d+)?", line)
        assert all(quote in lesson for quote in quotes), line


def test_lesson_help_and_wrong_argument_make_no_plots(run_main, monkeypatch):
    monkeypatch.setattr(stability, "make_lesson", lambda folder: pytest.fail("make_lesson ran"))
    result = run_main("--help", main=lesson_main)
    assert result.code == 0 and "docs/backprop.md" in result.out
    result = run_main("docs", main=lesson_main)
    assert result.code == 2 and result.err.count("\n") == 1 and "--help" in result.err


def test_lesson_names_only_existing_functions():
    names = re.findall(r"`(\w+)\(\)`", (DOCS / "backprop.md").read_text())
    assert len(names) >= 5
    assert all(hasattr(network, name) or hasattr(stability, name) for name in names)


def test_resume_after_kill_gives_bitwise_identical_trace(run_main, tmp_path, interrupt_at):
    overrides = "experiment=backprop", "trainer.max_epochs=20", "callbacks.resume.every_steps=6"
    assert run_main(*overrides, f"hydra.run.dir={tmp_path / 'whole'}").code == 0
    interrupt_at(15, SimulatedKill)
    with pytest.raises(SimulatedKill):
        run_main(*overrides, f"hydra.run.dir={tmp_path / 'run'}")
    result = run_main(f"resume={tmp_path / 'run'}")
    assert result.code == 0, result.err
    assert read_outcome(tmp_path / "run") == read_outcome(tmp_path / "whole")
    assert (tmp_path / "run/trace.csv").read_bytes() == (tmp_path / "whole/trace.csv").read_bytes()
