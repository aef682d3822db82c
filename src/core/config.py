"""What a config may say: which classes it may name, which values their arguments allow, which key a mistyped one meant.

The rules stand where the arguments do, as annotations (src.core.value_types), and are read from the source without importing it;
only those of other packages stand here.
"""

import ast
import importlib
import os
import re
import types
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from src.core import value_types as values
from src.core.errors import UserError
from src.core.value_types import (
    NonEmptyStr,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Probability,
    Seed,
    StudyName,
    UnitInterval,
)

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
PACKAGE = __name__.partition(".")[0]

# The keys that belong to no class: those of conf/train.yaml and conf/tune.yaml themselves.
ROOT_KEYS: dict[str, Any] = {
    "name": NonEmptyStr,
    "seed": Seed,
    "test": bool,
    "optimized_metric": NonEmptyStr | None,
    "optimized_mode": Literal["max", "min"],
    "allowed_packages": Sequence[NonEmptyStr],
    "resume": NonEmptyStr | None,
    "n_trials": PositiveInt,
    "study_name": StudyName,  # SQLite's address of its file would end there
    "storage": NonEmptyStr | None,
    "heartbeat": PositiveInt,
}
_UNLIMITED = PositiveInt | Literal[-1]
_BATCHES = NonNegativeInt | UnitInterval | None
# Of other packages' classes, those whose own messages are none or come late.
LIBRARY_ARGUMENTS: dict[str, dict[str, Any]] = {
    "torch.optim.*": {"lr": PositiveFloat, "momentum": Probability, "weight_decay": NonNegativeFloat, "nesterov": bool},
    "torch.optim.lr_scheduler.*": {
        "interval": Literal["step", "epoch"] | None,
        "monitor": NonEmptyStr | None,
        "pct_start": UnitInterval,
        "div_factor": PositiveFloat,
        "final_div_factor": PositiveFloat,
    },
    "lightning.Trainer": {
        "max_epochs": _UNLIMITED,
        "max_steps": _UNLIMITED,
        "num_nodes": PositiveInt,
        "limit_train_batches": PositiveInt | PositiveFraction | None,
        "limit_val_batches": _BATCHES,
        "limit_test_batches": _BATCHES,
        "gradient_clip_val": NonNegativeFloat | None,
        "log_every_n_steps": PositiveInt,
        "accumulate_grad_batches": PositiveInt,
        "check_val_every_n_epoch": PositiveInt | None,
        "val_check_interval": PositiveInt | PositiveFraction | None,
    },
}
# What a config may name of other packages. Classes alone, at the places they are documented at: a longer path would
# lead on through the modules that a module imports, to os.system.
ALLOWED_TARGETS = re.compile(
    r"torch\.(optim|optim\.lr_scheduler|nn)\.[A-Z]\w*"
    r"|lightning\.Trainer"
    r"|optuna\.(samplers|pruners)\.[A-Z]\w*"
    r"|lightning\.pytorch\.(callbacks|loggers|profilers|strategies|plugins|plugins\.environments)\.[A-Z]\w*"
    r"|torchvision\.models\.[A-Za-z]\w*"
)
# What a function of this project has to say that it gives, for a config to name it.
ALLOWED_RETURN_TYPES = (
    "Module",
    "Sequential",
    "LightningModule",
    "LightningDataModule",
    "ProgressBar",
    "Callback",
    "Logger",
)


def resolve_config(config: DictConfig) -> DictConfig:
    """The config without interpolations, so that what is checked is what is built. Raises UserError, or OmegaConf's."""
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; set {error.full_key}=…") from error
    for key, value in iterate_items(plain):
        if isinstance(value, str) and "${" in value:  # it would be resolved when it is built
            raise UserError(f"{key}={value}: a value may not hold ${{")
    result = OmegaConf.create(plain)
    assert isinstance(result, DictConfig)
    OmegaConf.set_struct(result, True)
    return result


def validate_config(config: DictConfig, allowed: Sequence[str] | None = None) -> None:
    """Raises UserError for a class that a resolved config may not name, and for a value that an argument cannot have.

    Packages beside those offered are `allowed`; by default, what the config itself says.
    """
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    packages = plain.get("allowed_packages", []) if allowed is None else allowed
    nodes = [(key, node) for key, node in [("", plain), *iterate_items(plain)] if isinstance(node, dict)]
    for _, node in nodes:
        if "_target_" in node and not _offered(node["_target_"], packages):
            raise UserError(
                f"_target_={node['_target_']}: not a class that this project or its libraries offer to configs; "
                "a package of your own goes into allowed_packages: in conf/train.yaml"
            )
    for prefix, node in nodes:
        hints = get_annotations(node["_target_"]) if "_target_" in node else {} if prefix else ROOT_KEYS
        for name, value in node.items():
            key = f"{prefix}.{name}".removeprefix(".")
            if hints.get("**") is None and "_target_" in node and name not in hints and not str(name).startswith("_"):
                guess = find_closest(name, list(hints))
                raise UserError(
                    f"{key}: {node['_target_'].rpartition('.')[2]} has no such argument"
                    + (f"; did you mean {guess}?" if guess else f"; it has {', '.join(hints) or 'none'}")
                )
            if (hint := hints.get(name)) and not matches_annotation(value, hint):
                empty = value == os.environ.get("MNIST_ROOT") == ""
                fix = "; MNIST_ROOT is empty: unset it, or name a folder" if empty else ""
                raise UserError(f"{key}={value}: must be {describe_annotation(hint)}{fix}")


def iterate_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a plain container with its value, inner ones included."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in inner:
        key = f"{prefix}.{name}".removeprefix(".")
        yield key, value
        yield from iterate_items(value, key)


def load_allowed_packages() -> list[str]:
    """The packages that conf/train.yaml admits, whatever a config from elsewhere says."""
    config = OmegaConf.to_container(OmegaConf.load(CONF / "train.yaml"))
    return list(config["allowed_packages"]) if isinstance(config, dict) else []


def _offered(target: Any, allowed: Sequence[str]) -> bool:
    """Whether a config may have it built. Of this project nothing is imported to find out."""
    if not isinstance(target, str):
        return False
    if ALLOWED_TARGETS.fullmatch(target):
        return True
    module, _, name = target.rpartition(".")
    if module.partition(".")[0] in allowed and re.fullmatch(r"\w+(\.\w+)+", target):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"_target_={target}: {error}") from error
        # Where it is from, lest a path lead through the package to what it imports.
        return str(getattr(found, "__module__", "")).partition(".")[0] == module.partition(".")[0]
    statement = _definition(target)
    if name.startswith("_"):
        return False
    if isinstance(statement, ast.FunctionDef):
        given = ast.unparse(statement.returns).rpartition(".")[2] if statement.returns else ""
        return given in ALLOWED_RETURN_TYPES
    return statement is not None


def _definition(target: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The statement that defines a class or a function of this project, the programs themselves left out."""
    module, _, name = target.rpartition(".")
    if not re.fullmatch(rf"{PACKAGE}(?!\.(command|sweeps|benchmark)\b)(\.[a-z_]\w*)+", module):
        return None
    base = ROOT.joinpath(*module.split("."))
    file = next((file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()), None)
    return _statements(file).get(name) if file else None


@cache
def _statements(file: Path) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    body = ast.parse(file.read_text()).body
    return {part.name: part for part in body if isinstance(part, ast.ClassDef | ast.FunctionDef)}


@cache
def get_annotations(target: str) -> dict[str, Any]:
    """By name, what each argument of a class or a function may be; None where nothing is said.

    "**" stands for further ones: of those nothing is known.
    """
    statement = _definition(target)
    if isinstance(statement, ast.ClassDef):
        statement = next((s for s in statement.body if isinstance(s, ast.FunctionDef) and s.name == "__init__"), None)
    if statement is None:
        rules = LIBRARY_ARGUMENTS.get(target) or LIBRARY_ARGUMENTS.get(target.rpartition(".")[0] + ".*") or {}
        return {**rules, "**": Any}
    named = [*statement.args.posonlyargs, *statement.args.args, *statement.args.kwonlyargs]
    hints = {argument.arg: _hint(argument.annotation) for argument in named if argument.arg != "self"}
    return hints | ({"**": Any} if statement.args.kwarg else {})


def _hint(annotation: ast.expr | None) -> Any:
    names = vars(values) | {"Sequence": Sequence, "Literal": Literal, "Annotated": Annotated}
    try:
        return eval(ast.unparse(annotation), names) if annotation else None  # of this project's own source
    except (NameError, TypeError, AttributeError):  # a class that would have to be imported
        return None


def matches_annotation(value: Any, hint: Any) -> bool:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return parts[1].allows(value)
    if kind in (Union, types.UnionType):
        return any(matches_annotation(value, part) for part in parts)
    if kind is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind is not None and issubclass(kind, Sequence):
        return isinstance(value, list) and all(matches_annotation(each, parts[0]) for each in value)
    if hint in (None, types.NoneType):
        return value is None
    if hint in (bool, int, str):
        return type(value) is hint
    return type(value) in (int, float) if hint is float else True


def describe_annotation(hint: Any) -> str:
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return parts[1].words
    if kind in (Union, types.UnionType):
        return ", or ".join(map(describe_annotation, parts))
    if kind is Literal:
        return ("one of " if len(parts) > 1 else "") + ", ".join(map(str, parts))
    if kind is not None and issubclass(kind, Sequence):
        return f"a list; each of it {describe_annotation(parts[0])}"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    return "null" if hint in (None, types.NoneType) else plain[hint]


def find_closest(key: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """The known key that `key` most likely meant; a bare last part, as in max_epochs, counts as well."""

    def likeness(candidate: str) -> float:
        last = candidate.rpartition(".")[2]
        whole_key = SequenceMatcher(None, key, candidate).ratio()
        # A little less for the last part alone, so that the full key wins where both fit.
        return max(whole_key, 0.95 * SequenceMatcher(None, key.rpartition(".")[2], last).ratio())

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None
