"""Print --help from the comments in conf/ and the annotations of arguments, so that nothing is written down twice."""

import argparse
import json
import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import hydra
import yaml
from omegaconf import OmegaConf

from src.core.config import CONF, find_closest, get_annotations, iterate_items
from src.core.errors import UserError
from src.core.run_folder import YAML_LOADER, read_yaml
from src.core.value_types import ROOT_KEYS, to_constraint

HIDDEN_KEYS = re.compile(r"^hydra\b|\.\d+(\.|$)|\._\w+_$")  # Hydra's, items of lists, _target_ and the like


def print_help(config_name: str, words: Sequence[str]) -> None:
    """Print help for the program, or for the config groups and keys that `words` name, with the overrides in them."""
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        config = hydra.compose(config_name, [word for word in words if "=" in word], return_hydra_config=True)
    groups = sorted(folder.name for folder in CONF.iterdir() if folder.is_dir())
    chosen = {group: re.findall(r"\w+", str(config.hydra.runtime.choices.get(group))) for group in groups}
    roots = [CONF / f"{name}.yaml" for name in dict.fromkeys(("train", config_name))]
    comments = {key: comment for file in roots for key, comment in _read_comments(file).items()}
    in_groups = {group: _read_group_comments(group, chosen[group]) for group in groups}
    known = {key: comment for part in (comments, *in_groups.values()) for key, comment in part.items() if comment}
    items = [item for item in iterate_items(OmegaConf.to_container(config)) if not HIDDEN_KEYS.search(item[0])]
    rows = {key: _make_row(config, key, value, known.get(key, "")) for key, value in items}
    if not (words := [word for word in words if "=" not in word]):
        for line in _read_head(roots[-1]):
            print(*reversed(re.split("  +", line)), sep="\n    ")  # an example's description before its command
        _print_table("experiment=NAME", _list_options("experiment", is_short=True))
        options = {group: [name for name, _ in _list_options(group)] for group in groups if group != "experiment"}
        marked = [(g, " ".join("*" * (name in chosen[g]) + name for name in names)) for g, names in options.items()]
        _print_table("GROUP=NAME, * is chosen; --help GROUP describes one", marked)
        title = "KEY=VALUE (current); --help KEY describes one, --cfg job prints all"
        _print_table(title, [rows[key] for key in rows if key in comments])
    for word in words:
        keys = [key for key in rows if re.search(rf"(^|\.){re.escape(word)}($|\.)", key)]
        if word in groups:
            _print_table(f"{word}=NAME", _list_options(word))
            keys = [key for key in rows if key in in_groups[word] or key.partition(".")[0] == word]
        elif not keys:
            match = find_closest(word, [*groups, *rows])
            raise UserError(f"--help {word}: no such group or key" + (f"; did you mean {match}?" if match else ""))
        _print_table("KEY=VALUE (current)", [rows[key] for key in keys])


def _read_head(file: Path) -> list[str]:
    """Return the lines of the comment at the top of a file."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return [line[2:] for line in lines if "@package" not in line]


def _list_options(group: str, is_short: bool = False) -> list[tuple[str, str]]:
    """Return the options of a group with their descriptions, or the first part of them, and what their commands do."""
    options = []
    for file in sorted((CONF / group).glob("*.yaml")):
        examples = [re.sub("^python .*?  +", "", line) for line in _read_head(file) if line.startswith("python ")]
        texts = [line for line in _read_head(file) if not line.startswith("python ")]
        texts = [re.split(r"[.:;,]( |$)", texts[0])[0] + "."] if texts and is_short else texts
        options.append((file.stem, " ".join([*texts, "; ".join(examples[:1] if is_short else examples)])))
    return options


def _read_group_comments(group: str, names: Iterable[str]) -> dict[str, str]:
    """Return the comments on the keys of the chosen options, and of the options that their defaults lists name."""
    comments: dict[str, str] = {}
    for file in (CONF / group / f"{name}.yaml" for name in names):
        if file.is_file():
            defaults = (read_yaml(file) or {}).get("defaults", [])
            bases = _read_group_comments(group, [item for item in defaults if isinstance(item, str)])
            own = _read_comments(file)
            comments |= bases | {key: comment for key, comment in own.items() if comment or key not in bases}
    return comments


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
    return comments


def _make_row(config: Any, key: str, value: Any, comment: str) -> tuple[str, str]:
    section, _, name = key.rpartition(".")
    node = OmegaConf.select(config, section) if section else {}
    annotations = get_annotations(node["_target_"]) if "_target_" in node else {} if section else ROOT_KEYS
    constraint = to_constraint(annotations.get(name))
    if isinstance(value, dict):
        value = str(value.get("_target_", "")).rpartition(".")[2]
    text = json.dumps(value) if value is None or isinstance(value, bool) else str(value).replace(" ", "")
    values = constraint.description if constraint else ""
    return f"{key}={text}".removesuffix("="), comment if values in comment else f"{comment} ({values})".lstrip()


def _print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and descriptions as argparse does: a name too long for its column has a line of its own."""
    formatter = argparse.HelpFormatter("", max_help_position=32)
    formatter.start_section(title)
    formatter.add_arguments(argparse.Action([], name, help=text.replace("%", "%%")) for name, text in rows)
    formatter.end_section()
    print(f"\n{formatter.format_help().rstrip()}")
