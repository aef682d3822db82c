"""The documents against the project: links, scores, times, commands."""

import re
import shlex
import shutil
import subprocess
from importlib import import_module
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

from docs.roofline import measure_layer
from docs.seeds import make_rows
from src.core.config import CONF, ROOT, resolve_config, validate_config

FILES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "weights/README.md"])


def make_anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file):
    for link in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if not re.match(r"https?://|\.\./\.\./actions", link):
            name, _, anchor = link.partition("#")
            target = file.parent / name if name else file
            assert target.exists(), link
            assert target.suffix != ".md" or not anchor or anchor in make_anchors(target.read_text()), link


def test_results_have_the_scores_of_the_seeds():
    rows = make_rows()
    text = (ROOT / "docs/results.md").read_text()
    table = [line for line in text.splitlines() if re.match(r"\| `\w+`.*\| (99\.\d\d%|–) \| [\d. to]*[%–] \|$", line)]
    assert len(rows) > 20 and set(rows) <= set(text.splitlines()) and set(table) <= set(rows)


def test_roofline_counts_the_operations_of_a_layer():
    assert measure_layer(torch.nn.Conv2d(1, 2, 3), torch.rand(4, 1, 8, 8))[0] == 2 * 2 * (4 * 2 * 6 * 6) * 9


def test_recipes_have_one_time_and_one_accuracy():
    """Compare the table in docs/results.md with the configs, `make help` and README.md."""
    results, readme, makefile = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md", "Makefile"))
    accuracies = dict(re.findall(r"^\| `(\w+)`(?:, seed \d)? \| \w \|.*?\| ([\d.]+(?: ± [\d.]+)?%)", results, re.M))
    recipes = re.findall(r"^\| `(\w+)` \| ([\d,]+ s) on an? (\w+)", results, re.M)
    assert len(recipes) == 8
    for name, seconds, processor in recipes:
        path, target = ("train", "(?:train|sweep|tune)") if name == "default" else (f"experiment/{name}", name)
        header = (ROOT / f"conf/{path}.yaml").read_text().partition("defaults:")[0]
        assert re.search(rf"{seconds} on one thread of an? {processor}; test accuracy {accuracies[name]}", header), name
        row = r"\(no experiment\)" if name == "default" else f"`{name}`"
        (line,) = re.findall(rf"^\| {row} \|.*", readme, re.M) if name != "teacher" else [""]
        assert processor in readme and (all(word in line for word in (seconds, accuracies[name])) or not line), line
        added = {"record": "8 min", "distilled": "18 s"}.get(name, "")  # to compute teacher outputs
        assert all(added in text for text in (results, readme, header)), name
        assert all(seconds in x and added in x for x in re.findall(rf"^{target}:.*##.*", makefile, re.M)), name


def test_readme_is_short_and_its_code_fits_a_terminal():
    text = (ROOT / "README.md").read_text()
    code = "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    assert text.count("\n") <= 180 and max(map(len, code.splitlines())) <= 80


# Commands that are only composed and validated here, and why. docs/own.md is missing in it: test_own.py runs that page.
ONLY_COMPOSED = {
    r".*(=submitit_slurm|=joblib|=ddp)": "need Slurm, processes or images; tests/sweeps runs them",
    r".*(accelerator=gpu|cuda_graph)": "need a GPU; test_gpu.py and test_cuda_graph.py of tests/training run them",
    r".*data=(fashion|kmnist|medmnist|folder|npz)": "need other data; tests/data and test_own.py have it",
    r".*resume=RUN": "needs a constant learning rate; tests/training/test_resume.py runs it",
}
# Commands that are neither composed nor run here, and why.
NOT_RUN = {
    r"(if .*|else )?srun ": "need Slurm; tests/sweeps/test_slurm.py runs them",
    r"(python -m )?(pytest|ruff)|find |echo ": "are the checks themselves; end make clean and make help",
    r"(uv|pip|python3 -m venv|source) ": "install or activate the environment that runs this test",
    r"(python -m )?tensorboard|python -m src\.draw|python3 -c |.*--open": "serve until stopped, or open the browser",
    r"python -m src\.predict$|.*=mine|.* trainer\.max_epoch=": "lack a file that the page shows; is a mistake",
    r"python -m src\.evaluate --fit-ood": "changes the shipped weights; tests/models/test_ood.py runs it",
    r"python -m (src\.b|tests\.|docs\.)": "take minutes, or write files; their own tests call them",
}
PROGRAMS = r"(\S*python\d? -m|make|pytest|tensorboard|source|uv|pip|git|rm|torchrun|sbatch|srun|if .*srun|else srun) "
# What is put in the place of names and other folders.
NAMES = {"=NAME": "=fast", "IMAGE…": "FILES", "FILES": "tests/images", "/shared/": ""}
NAMES |= {"[WEIGHTS]": "WEIGHTS", "[--weights WEIGHTS]": "--weights WEIGHTS", "tests/": f"{ROOT}/tests/"}
NAMES |= {"=RUN": "=outputs/mnist/FOLDER", " FOLDER": " outputs/mnist/FOLDER_multirun"}


def list_commands() -> list[str]:
    """Return the commands of documents, make's targets and comments of configs, in one line each."""
    lines = re.findall(r"^# (python -m .*?)(?:    .*)?$", "\n".join(map(Path.read_text, CONF.rglob("*.yaml"))), re.M)
    lines += [f"make {target}" for target in re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.M)]
    for file in (file for file in FILES if file.name not in ("own.md", "log.md")):
        text = re.sub(r"^```yaml\n.*?^```", "", file.read_text().replace("\\\n", " "), flags=re.M | re.S)
        lines += "".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)).replace("$ ", "").splitlines()
        lines += re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    commands = {re.sub(r"\s+", " ", re.sub(r"  +#.*", "", line)) for line in lines if re.match(PROGRAMS, line)}
    return sorted(set(map(expand_make, commands)))


def expand_make(command: str) -> str:
    if command.startswith("make "):
        command = subprocess.check_output(f"{command} -n --no-print-directory", shell=True, cwd=ROOT, text=True)
    return command.strip().splitlines()[-1].replace(".venv/bin/", "")


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in list_commands() if not re.match("|".join(NOT_RUN), each)])
def test_command_runs(command, request, run_main, mnist_root, tmp_path, monkeypatch):
    """Compose and validate the config of the first value of each swept key; run the command on a few images."""
    is_run = not re.match("|".join(ONLY_COMPOSED), command)
    for name, value in NAMES.items():
        command = command.replace(name, value)
    python, flag, program, *arguments = shlex.split(re.sub(r"range\(\d+\)", "range(2)", command))
    assert [python, flag] == ["python", "-m"], f"{command}: needs a line in NOT_RUN"
    if program in ("src.train", "src.tune") and "--help" not in command:
        overrides = [re.sub("^init_from=", "init_from.path=", word) for word in arguments if word != "-m"]
        for number, each in enumerate(OverridesParser.create().parse_overrides(overrides)):
            if each.is_sweep_override():
                overrides[number] = f"{each.key_or_group}={next(each.sweep_string_iterator())}"
        with initialize_config_dir(str(CONF), version_base="1.3"):
            validate_config(resolve_config(compose(program.removeprefix("src."), overrides)))
        short = ["trainer.max_epochs=1", "trainer.limit_train_batches=2"]
        images = ["data.val_size=10", "data.train_size=null", "data.batch_size=8", "trainer.accelerator=cpu"]
        arguments += [] if "resume=" in command else short if "backprop" in command else [*short, *images]
    if is_run:
        monkeypatch.setenv("MNIST_ROOT", str(mnist_root))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "weights").symlink_to(ROOT / "weights")
        shutil.copytree(request.getfixturevalue("finished_run"), "outputs/mnist/FOLDER")
        shutil.copytree(request.getfixturevalue("finished_sweep"), "outputs/mnist/FOLDER_multirun")
        shutil.copy(request.getfixturevalue("small_weights"), "WEIGHTS")
        arguments += {"src.evaluate": ["--data=digits"], "src.tune": ["n_trials=2"]}.get(program, [])
        result = run_main(*arguments, main=import_module(program).main)
        assert result.code == 0, result.err
