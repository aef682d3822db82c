"""The documents against the project: links, scores, times, commands."""

import re
import shlex
import subprocess

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser

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


def test_recipes_have_one_time_and_one_accuracy():
    """Compare the table in docs/results.md with the configs, `make help` and README.md."""
    results, readme, makefile = ((ROOT / name).read_text() for name in ("docs/results.md", "README.md", "Makefile"))
    accuracies = dict(re.findall(r"^\| `(\w+)`(?:, seed \d)? \| \w \|.*?\| ([\d.]+(?: ± [\d.]+)?%)", results, re.M))
    recipes = re.findall(r"^\| `(\w+)` \| ([\d,]+ s) on an? (\w+)", results, re.M)
    assert len(recipes) == 7
    for name, seconds, processor in recipes:
        path, target = ("train", "train") if name == "default" else (f"experiment/{name}", name)
        header = (ROOT / f"conf/{path}.yaml").read_text().partition("defaults:")[0]
        assert re.search(rf"{seconds} on one thread of an? {processor}; test accuracy {accuracies[name]}", header), name
        (line,) = re.findall(rf"^\| `{name}` \|.*", readme, re.M) if name != "teacher" else [""]
        assert all(word in line for word in (seconds, processor, accuracies[name])) or not line, line
        assert all(seconds in line for line in re.findall(rf"^{target}:.*##.*", makefile, re.M)), name


# Commands that the next test does not try, and why. docs/own.md is missing in it: test_own.py runs all of that page.
UNTRIED = {
    r"srun |.*\$RUN": "need Slurm; tests/sweeps/test_slurm.py runs them",
    r"make (test|lint|format|clean)|pytest ": "are the tests and the checks themselves",
    r"(uv|pip|python3 -m venv|source) ": "install or activate the environment that runs this test",
    r"(python -m )?tensorboard": "serves until it is stopped",
    r"@?echo |python3 -c ": "print the list of make help; open the lesson in the browser",
    r"python -m src\.predict": "tests/cli/test_predict.py runs it",
    r"python -m src\.draw": "serves until it is stopped; tests/cli/test_draw.py runs it",
    r"python -m src\.evaluate": "tests/training/test_predictor.py runs it",
    r"python -m src\.export": "tests/cli/test_export.py runs it",
    r"python -m src\.report": "tests/sweeps/test_sweeps.py runs it",
    r"python -m src\.benchmark": "takes minutes; tests/benchmark/test_benchmark.py runs it",
    r"python -m src\.backprop": "tests/backprop/test_lesson.py runs it",
    r"python -m tests\.images\.photos": "tests/cli/test_photos.py tests its photos",
    r"python -m docs\.seeds": "test_results_have_the_scores_of_the_seeds calls it",
    r".*(--help| trainer\.max_epoch=)": "tests/cli/test_console.py asserts what is printed",
    r".*(sweep|search)=mine": "needs the file that the page shows",
}


def read_commands(text: str) -> set[str]:
    """Return the commands of the code blocks and of the sentences, without comments, in one line each."""
    text = re.sub(r"^```yaml\n.*?^```", "", text.replace("\\\n", " "), flags=re.M | re.S)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    lines = [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]
    lines += [re.sub(r"\s+", " ", span) for span in spans]
    programs = r"python\d? -m|make|pytest|tensorboard|source|uv|pip|srun|if .*srun|else srun"
    return {re.sub(r"  +#.*", "", line) for line in lines if re.match(rf"({programs}) ", line)}


def is_untried(command: str) -> bool:
    return any(re.match(pattern, command) for pattern in UNTRIED)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_are_accepted(file):
    """Compose and validate the config of each command that trains, for the first value of each swept key."""
    for command in sorted(read_commands(file.read_text()) if file.name != "own.md" else ()):
        if command.startswith("make ") and not is_untried(command):
            printed = subprocess.run(
                ["make", "--no-print-directory", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True, text=True
            )
            command = printed.stdout.splitlines()[-1].replace(".venv/bin/", "")
        if is_untried(command):
            continue
        python, flag, program, *arguments = shlex.split(command.replace("=NAME", "=fast"))
        assert [python, flag] == ["python", "-m"] and program in ("src.train", "src.tune"), command
        overrides = [re.sub("^init_from=", "init_from.path=", word) for word in arguments if word != "-m"]
        parsed = OverridesParser.create().parse_overrides(overrides)
        first = [
            next(each.sweep_string_iterator()) if each.is_sweep_override() else each.get_value_element_as_str()
            for each in parsed
        ]
        chosen = [f"{each.input_line.partition('=')[0]}={value}" for each, value in zip(parsed, first, strict=True)]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            validate_config(resolve_config(compose(program.removeprefix("src."), chosen)))
