"""--help, from the comments in conf/ and the rules of arguments (src.core.config): nothing is written down twice."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from src.core.config import CONF, ROOT_KEYS, describe_annotation, find_closest, get_annotations
from src.core.errors import UserError

Row = tuple[str, str]


def print_help(config_name: str, asked: Sequence[str], overrides: Sequence[str]) -> None:
    """Prints what the root config, the groups or the keys that are `asked` for say of themselves."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(hydra.compose(config_name, list(overrides), return_hydra_config=True))
    assert isinstance(config, dict)
    chosen = config.pop("hydra")["runtime"]["choices"]
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    chosen = {group: chosen.get(group, [*config.get(group, {})]) for group in groups}  # several loggers by their names
    roots = [CONF / f"{name}.yaml" for name in dict.fromkeys(("train", config_name))]
    files = [*roots, *(file for group in groups for file in _options(group, chosen[group]))]
    notes = {key: note for file in files for key, note in _notes(file).items() if note}
    rows = {key: _row(key, value, rule, notes.get(key, "")) for key, value, rule in _leaves(config, ROOT_KEYS)}
    if not asked:
        print(*(re.sub("  +", "\n    ", line) for line in _head(roots[-1])), "", sep="\n")
        _table("experiment=NAME: whole recipes", list(_summaries("experiment")))
        names = [(group, " ".join(_starred(group, chosen[group]))) for group in groups if group != "experiment"]
        _table(f"GROUP=NAME: other parts (* now); python -m src.{config_name} --help GROUP tells of one", names)
        own = [key for file in roots for key in _notes(file) if key in rows]
        _table("KEY=VALUE: now, and what it may be", [rows[key] for key in own])
        print("--help KEY tells of a key, --cfg job shows the whole config.")
    for word in asked:
        if word in groups:
            _table(f"{word}=NAME", [(name, _told(CONF / word / f"{name}.yaml")) for name in _names(word)])
            own = [key for file in _options(word, chosen[word]) for key in _notes(file)]
            found = [key for key in rows if key in own or key.partition(".")[0] == word]
        else:
            found = [key for key in rows if re.search(rf"(^|\.){re.escape(word)}($|\.)", key)]
        if not found and word not in groups:
            guess = find_closest(word, [*groups, *rows])
            raise UserError(f"--help {word}: no such group or key" + (f"; did you mean {guess}?" if guess else ""))
        if found:
            _table("KEY=VALUE: now, and what it may be", [rows[key] for key in found])


def _names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _starred(group: str, chosen: Any) -> list[str]:
    return [
        f"*{name}" if name in (chosen if isinstance(chosen, list) else [chosen]) else name for name in _names(group)
    ]


def _summaries(group: str) -> Iterator[tuple[str, str]]:
    """Of each option what its first comment says, without the command there."""
    for name in _names(group):
        first = (_head(CONF / group / f"{name}.yaml") or [""])[0]
        yield name, re.sub(r"^python -m .*?  +", "", first)


def _options(group: str, chosen: Any) -> list[Path]:
    """The files of a choice, those that it begins with first."""
    files: list[Path] = []
    for name in chosen if isinstance(chosen, list) else [chosen]:
        file = CONF / group / f"{name}.yaml"
        if file.is_file():
            begun = [one for one in _read(file).get("defaults", []) if isinstance(one, str) and one != "_self_"]
            files += [*(each for one in begun for each in _options(group, one)), file]
    return files


def _read(file: Path) -> dict[str, Any]:
    return yaml.load(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def _head(file: Path) -> list[str]:
    """The comment that a file begins with."""
    lines = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            lines.append(line[2:])
    return lines


def _told(file: Path) -> str:
    """That comment as one paragraph, but commands in lines of their own."""
    return re.sub(r"\n(?!python)", " ", "\n".join(_head(file)))


def _notes(file: Path) -> dict[str, str]:
    """By key of the whole config, the comment beside it or, within the file, in the line above."""
    lines = file.read_text().splitlines()
    group = "" if "@package _global_" in lines[0] or file.parent == CONF else f"{file.parent.name}."
    found: dict[str, str] = {}

    def walk(node: Any, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line
            beside = re.search(r"\s# (.*)", lines[line])
            above = re.fullmatch(r"\s+# (.*)", lines[line - 1]) if line else None
            note = beside or above
            found[f"{prefix}{key.value}"] = note[1].strip() if note else ""
            walk(value, f"{prefix}{key.value}.")

    walk(yaml.compose("\n".join(lines), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), group)
    return {key: note for key, note in found.items() if key.split(".")[0] not in ("hydra", "defaults")}


def _leaves(node: dict[Any, Any], rules: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every key with its value and its rule. What a class is built of has its rules; its name is the value."""
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            target = value.get("_target_", "")
            yield key, target.rpartition(".")[2], None
            yield from _leaves(value, get_annotations(target) if target else {}, f"{key}.")
        elif name not in ("_partial_", "_target_"):
            yield key, value, rules.get(str(name))


def _row(key: str, value: Any, rule: Any, note: str) -> Row:
    try:
        allowed = describe_annotation(rule) if rule is not None and rule is not Any else ""
    except KeyError:  # a class
        allowed = ""
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value).replace(" ", "")
    return f"{key}={text}".removesuffix("="), f"{note} ({allowed})".lstrip() if allowed else note


def _table(title: str, rows: Sequence[Row]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=36)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(title, style="bold")
    console.print(table)
    console.print()
