"""The documents against the project."""

import re

import pytest

from docs.seeds import make_rows
from src.core.config import ROOT

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
    recipes = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+ s) on an? (\w+)", results, re.M)
    assert len(recipes) == 7
    for name, seconds, processor in recipes:
        path, target = ("train", "train") if name == "default" else (f"experiment/{name}", name)
        header = (ROOT / f"conf/{path}.yaml").read_text().partition("defaults:")[0]
        assert re.search(rf"{seconds} on one thread of an? {processor}; test accuracy {accuracies[name]}", header), name
        (line,) = re.findall(rf"^\| `{name}` \|.*", readme, re.M) if name != "teacher" else [""]
        assert all(word in line for word in (seconds, processor, accuracies[name])) or not line, line
        assert all(seconds in line for line in re.findall(rf"^{target}:.*##.*", makefile, re.M)), name
