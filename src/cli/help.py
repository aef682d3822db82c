"""Print --help: the YAML files of conf/ with their comments are the documentation of all groups and keys."""

import re
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

from src.core.config import CONF, find_closest
from src.core.errors import UserError

GROUPS = {folder.name: sorted(folder.glob("*.yaml")) for folder in sorted(CONF.iterdir()) if folder.is_dir()}


def print_help(config_name: str, words: Sequence[str]) -> None:
    """Print help for the program, or for the groups, options (as optimizer=muon) and keys that `words` name."""
    roots = {name: (CONF / f"{name}.yaml").read_text(encoding="utf-8") for name in (config_name, "train")}
    if not words:
        print(_read_head(CONF / f"{config_name}.yaml"), "\nexperiment=NAME", sep="\n")
        for file in GROUPS["experiment"]:
            print(f"  {file.stem:10}", *_read_head(file).splitlines()[:1])
        print("\nGROUP=NAME; --help GROUP describes the options")
        for group, files in GROUPS.items():
            print(f"  {group:10}", *(file.stem for file in files))
        print("\nKEY=VALUE; --help KEY prints the lines of conf/ that set a key, --cfg job all keys with their values")
        for text in roots.values():
            print(*text.split("\n\n")[1:-1], sep="\n\n")  # between the defaults and Hydra's keys
        return
    defaults = dict(re.findall(r"^  - (\w+): \[?(\w+)", "".join(roots.values()), re.M))
    lines = _find_lines()
    for word in words:
        name, _, option = word.partition("=")
        if name in GROUPS:
            for file in GROUPS[name]:
                print(f"{name}={file.stem}", *_read_head(file).splitlines(), sep="\n    ")
            _print_option(CONF / name / f"{option or defaults.get(name)}.yaml")
        elif keys := [key for key in lines if f".{name}." in f".{key}."]:
            for key in keys:
                print(key, *lines[key], sep="\n    ")
        else:
            match = find_closest(name, [*GROUPS, *lines])
            raise UserError(f"--help {word}: no such group or key" + (f"; did you mean {match}?" if match else ""))


def _read_head(file: Path) -> str:
    """Return the comment at the top of a file, with the description of an example before its command."""
    lines = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    examples = (re.sub("^(python .*?)  +(.*)", r"\2\n    \1", line[2:]) for line in lines if "@package" not in line)
    return "\n".join(examples)


def _print_option(file: Path) -> None:
    """Print the file of an option after those of its group that it names as its defaults."""
    if file.is_file():
        text = file.read_text(encoding="utf-8")
        for base in re.findall(r"^  - (?!_self_)(\w+)$", text, re.M):
            _print_option(file.with_name(f"{base}.yaml"))
        print(f"\n{file.relative_to(CONF.parent)}:\n{text.rstrip()}")


def _find_lines() -> dict[str, list[str]]:
    """Return the lines of conf/ that set each key, by its name in the whole config; recipes are the last."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(CONF.rglob("*.yaml"))}
    found: dict[str, list[str]] = {}
    for file in sorted(texts, key=lambda file: "@package _global_" in texts[file]):
        is_global = "@package _global_" in texts[file] or file.parent == CONF
        parents = {-1: "" if is_global else f"{file.parent.name}."}  # by indentation
        for spaces, name, line in re.findall(r"^( *)(?=(\w+):)(.*)", texts[file], re.M):
            parents = {indent: parent for indent, parent in parents.items() if indent < len(spaces)}
            key = parents[max(parents)] + name
            parents[len(spaces)] = f"{key}."
            found.setdefault(key, []).append(f"{file.relative_to(CONF.parent)}: {line}")
    return found
