"""Print --help: the YAML files of conf/ with their comments are the documentation of all groups and keys."""

from src.core.config import CONF


def print_help(config_name: str) -> None:
    """Print what the program is for and its keys, the recipes with their first line, and the options of each group."""
    for name in dict.fromkeys((config_name, "train")):
        print((CONF / f"{name}.yaml").read_text(encoding="utf-8").partition("\n\nhydra:")[0], end="\n\n")
    print("experiment=NAME")
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        lines = [line.removeprefix("# ") for line in file.read_text(encoding="utf-8").splitlines() if line[:2] == "# "]
        print(f"  {file.stem:10}", *[line.rpartition("  ")[2] for line in lines if "@package" not in line][:1])
    print("\nGROUP=NAME, described in conf/GROUP/NAME.yaml; --cfg job prints all keys with their values")
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        print(f"  {folder.name:10}", *(file.stem for file in sorted(folder.glob("*.yaml"))))
