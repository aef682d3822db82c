"""Print --help from the comments in conf/ and the annotations of arguments, so that nothing is written down twice."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from src.core.config import CONF, find_closest, get_annotations, iterate_items
from src.core.errors import UserError
from src.core.value_types import ROOT_KEYS, to_constraint

YAML_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def print_help(config_name: str, words: Sequence[str], overrides: Sequence[str]) -> None:
    """Print help for the program, or for the config groups and keys that `words` name."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(hydra.compose(config_name, list(overrides), return_hydra_config=True))
    choices = config.pop("hydra")["runtime"]["choices"]
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    roots = [CONF / f"{name}.yaml" for name in dict.fromkeys(("train", config_name))]
    files = [*roots, *(file for group in groups for file in _list_files(group, choices.get(group)))]
    comments = {key: comment for file in files for key, comment in _read_comments(file).items() if comment}
    rows = {key: _make_row(config, key, value, comments.get(key, "")) for key, value in iterate_items(config)}
    rows = {key: row for key, row in rows.items() if not re.search(r"\.\d+(\.|$)|\._\w+_$", key)}
    heading = "KEY=VALUE: current value, description (allowed values)"
    if not words:
        print(*(re.sub("  +", "\n    ", line) for line in _read_head(roots[-1])), "", sep="\n")
        _print_table(
            "experiment=NAME: recipes",
            [(name, _read_summary("experiment", name)) for name in _list_options("experiment")],
        )
        others = [group for group in groups if group != "experiment"]
        options = [(group, " ".join(_mark_chosen(group, choices.get(group)))) for group in others]
        _print_table(f"GROUP=NAME (* is chosen); python -m src.{config_name} --help GROUP describes one", options)
        _print_table(heading, [rows[key] for file in roots for key in _read_comments(file) if key in rows])
        print("--help KEY describes a key, --cfg job prints the whole config.")
    for word in words:
        if word in groups:
            _print_table(
                f"{word}=NAME", [(name, _read_summary(word, name, whole=True)) for name in _list_options(word)]
            )
            keys = [key for file in _list_files(word, choices.get(word)) for key in _read_comments(file)]
            found = [key for key in rows if key in keys or key.partition(".")[0] == word]
        else:
            found = [key for key in rows if re.search(rf"(^|\.){re.escape(word)}($|\.)", key)]
        if not found and word not in groups:
            match = find_closest(word, [*groups, *rows])
            raise UserError(f"--help {word}: no such group or key" + (f"; did you mean {match}?" if match else ""))
        if found:
            _print_table(heading, [rows[key] for key in found])


def _list_options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def _mark_chosen(group: str, choice: Any) -> list[str]:
    chosen = choice if isinstance(choice, list) else str(choice).strip("[]").replace(" ", "").split(",")
    return [f"*{name}" if name in chosen else name for name in _list_options(group)]


def _list_files(group: str, choice: Any) -> list[Path]:
    """Return the files of the chosen options, after those that their defaults lists name."""
    files: list[Path] = []
    for name in choice if isinstance(choice, list) else str(choice).strip("[]").replace(" ", "").split(","):
        if (file := CONF / group / f"{name}.yaml").is_file():
            defaults = (yaml.load(file.read_text(encoding="utf-8"), Loader=YAML_LOADER) or {}).get("defaults", [])
            bases = [item for item in defaults if isinstance(item, str) and item != "_self_"]
            files += [*(base_file for base in bases for base_file in _list_files(group, base)), file]
    return files


def _read_head(file: Path) -> list[str]:
    """Return the comment at the top of a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    end = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return [line[2:] for line in lines[:end] if "@package" not in line]


def _read_summary(group: str, name: str, whole: bool = False) -> str:
    head = _read_head(CONF / group / f"{name}.yaml") or [""]
    return re.sub(r"\n(?!python)", " ", "\n".join(head)) if whole else re.sub(r"^python -m .*?  +", "", head[0])


def _read_comments(file: Path) -> dict[str, str]:
    """Return the comment beside each key, or above it, by the key's dotted name in the whole config."""
    lines = file.read_text(encoding="utf-8").splitlines()
    is_global = "@package _global_" in lines[0] or file.parent == CONF
    comments: dict[str, str] = {}

    def visit(node: Any, prefix: str) -> None:
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            line = key.start_mark.line
            comment = re.search(r"\s# (.*)", lines[line]) or re.fullmatch(r"\s+# (.*)", lines[max(line - 1, 0)])
            comments[f"{prefix}{key.value}"] = comment[1].strip() if comment else ""
            visit(value, f"{prefix}{key.value}.")

    visit(yaml.compose("\n".join(lines), Loader=YAML_LOADER), "" if is_global else f"{file.parent.name}.")
    return {key: comment for key, comment in comments.items() if key.split(".")[0] not in ("hydra", "defaults")}


def _make_row(config: Any, key: str, value: Any, comment: str) -> tuple[str, str]:
    *parents, name = key.split(".")
    node = config
    for parent in parents:
        node = node[int(parent)] if isinstance(node, list) else node[parent]
    annotations = ROOT_KEYS if not parents else get_annotations(node["_target_"]) if "_target_" in node else {}
    constraint = to_constraint(annotations.get(name))
    if isinstance(value, dict):
        value = str(value.get("_target_", "")).rpartition(".")[2]
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value).replace(" ", "")
    description = f"{comment} ({constraint.description})".lstrip() if constraint else comment
    return f"{key}={text}".removesuffix("="), description


def _print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(overflow="fold", max_width=36)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(title, style="bold")
    console.print(table)
    console.print()
