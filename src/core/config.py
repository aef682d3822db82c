"""Check a composed config: which classes it may name, which values their arguments take, what a typo meant.

The rules are the annotations of the arguments themselves (src.core.value_types). They are parsed from the source
without importing it, so that a mistake is reported before PyTorch is loaded.
"""

import ast
import importlib
import os
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import Any, Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from src.core import value_types
from src.core.errors import UserError
from src.core.value_types import LIBRARY_ARGUMENTS, NODE_KEYS, REFUSED_ARGUMENTS, ROOT_KEYS, ROOT_NODES, to_constraint

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
OUTPUT_DIR = "${hydra:runtime.output_dir}"
PACKAGE = __name__.partition(".")[0]

# Only classes at their documented places: a longer path would lead through imported modules to os.system.
ALLOWED_TARGETS = re.compile(
    r"torch\.(optim|optim\.lr_scheduler|nn)\.[A-Z]\w*"
    r"|lightning\.Trainer"
    r"|optuna\.(samplers|pruners)\.[A-Z]\w*"
    r"|lightning\.pytorch\.(callbacks|loggers|profilers|strategies|plugins|plugins\.environments)\.[A-Z]\w*"
    r"|torchvision\.(models\.[A-Za-z]|ops\.[A-Z])\w*"
    r"|torchmetrics\.(\w+\.)?[A-Z]\w*"
)
# Metrics of which lower values are better, by their names. "neg_" turns any name into its opposite.
LOWER_IS_BETTER = re.compile(
    r"(loss|losses|errors?|mse|mae|mape|perplexity|entropy|divergence|distance(?!_intersection)|deviance|regret|latency"
    r"|deviation|variation|disparity|cost|(edit|miss|false_\w+)_rate|fall_?out|info_lost|hinge|huber"
    r"|hausdorff|wasserstein|chamfer|perceptual_image_patch_similarity|ranked_probability_score)(?![a-z])"
    r"|(?<![a-z])(err|rmsle|nll|ppl|bp[cd]|cer|wer|ter|eer|fid|kl|ece|brier|lpips|emd|crps|angle)(?![a-z])",
    re.IGNORECASE,
)
NEGATED = re.compile(r"(?<![a-z])neg(ative)?_(?!rate)", re.IGNORECASE)
# A function of this project may be a _target_ if it returns an object of a class, by its annotation.
BUILDER_RETURN = re.compile(r"([\w.]+\.)?(?!None|Any|Path|Result)[A-Z]\w*")


def resolve_and_validate(config: DictConfig) -> DictConfig:
    """Resolve interpolations, then validate the config. Raises UserError."""
    config = resolve_config(config)
    validate_config(config)
    return config


def resolve_config(config: DictConfig) -> DictConfig:
    """Return the config without interpolations, so that what is validated is what is instantiated.

    Infer `optimized_mode` from the name of the metric if it is null. Raises UserError for a missing value and for
    a value that would be interpolated again. Outside a Hydra program the run folder is named here.
    """
    if OmegaConf.is_interpolation(config, "output_dir") and not HydraConfig.initialized():
        config = config.copy()
        config.output_dir = f"outputs/{config.name}/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    if "optimized_mode" in config and config.optimized_mode is None:
        config = config.copy()
        config.optimized_mode = infer_mode(config.optimized_metric)
    try:
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(f"{error.full_key} has no value; set {error.full_key}=…") from error
    for key, value in iterate_items(plain):
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{key}={value}: a value may not contain ${{")
    result = OmegaConf.create(plain)
    assert isinstance(result, DictConfig)
    OmegaConf.set_struct(result, True)
    return result


def infer_mode(metric: str | None) -> str:
    """Return "min" if the name of the metric says that lower is better, as in val/loss and test/rmse, else "max"."""
    name = str(metric)
    return "min" if bool(LOWER_IS_BETTER.search(name)) != bool(NEGATED.search(name)) else "max"


def validate_config(config: DictConfig) -> None:
    """Raise UserError for a class that a resolved config may not name, or a value that an argument does not take.

    Only conf/train.yaml allows further packages, because evaluate, predict and resume read other configs as well.
    """
    plain: Any = OmegaConf.to_container(config)
    packages = _load_allowed_packages(CONF / "train.yaml")
    nodes = [(key, node) for key, node in [("", plain), *iterate_items(plain)] if isinstance(node, dict)]
    for prefix, node in nodes:
        target = node.get("_target_")
        if "_target_" in node and not _is_allowed(target, packages):
            raise UserError(
                f"_target_={target}: neither a class of this project, or a function that is annotated to return an "
                "object, nor one that configs may name of its libraries; add its package to allowed_packages in "
                "the file conf/train.yaml"
            )
        annotations = get_annotations(target) | NODE_KEYS.get(prefix, {}) if target else {} if prefix else ROOT_KEYS
        for name, value in node.items():
            key = f"{prefix}.{name}".removeprefix(".")
            if target and not {name, "**"} & annotations.keys() and not str(name).startswith("_"):
                match = find_closest(str(name), list(annotations))
                hint = f"did you mean {match}?" if match else f"it has {', '.join(annotations) or 'none'}"
                raise UserError(f"{key}: {target.rpartition('.')[2]} has no such argument; {hint}")
            if fix := REFUSED_ARGUMENTS.get((target, name)):
                raise UserError(f"{key}: leave it out; {fix}")
            constraint = to_constraint(annotations.get(name))
            if constraint and not constraint.is_satisfied_by(value):
                is_empty_root = value == os.environ.get("MNIST_ROOT") == ""
                fix = "; MNIST_ROOT is empty: unset it, or set it to a folder" if is_empty_root else ""
                raise UserError(f"{key}={value}: must be {constraint.description}{fix}")


@cache  # a sweep validates each of its values
def _load_allowed_packages(file: Path) -> list[str]:
    return list(OmegaConf.load(file).allowed_packages)


def iterate_items(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every dotted key of a plain container with its value, nested ones included."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, value in items:
        key = f"{prefix}.{name}".removeprefix(".")
        yield key, value
        yield from iterate_items(value, key)


def list_keys(config: DictConfig) -> list[str]:
    """Return the keys of a config, without Hydra's own, and the config groups."""
    keys = [key for key, _ in iterate_items(OmegaConf.to_container(config)) if key.partition(".")[0] != "hydra"]
    return keys + [folder.name for folder in CONF.iterdir() if folder.is_dir()]


def describe_unknown_key(key: str, known: list[str]) -> str:
    """Return a line that names the closest known key."""
    if re.search(r"(^|\.)(ckpt(_path)?|checkpoint|resume_from_checkpoint|pretrained)$", key):
        return f"{key}: no such key; init_from=PATH starts a new run from weights, resume=RUN continues a run"
    match = find_closest(key, known)
    return f"{key}: no such key; " + (
        f"did you mean {match}?" if match else "python -m src.train --help lists all keys"
    )


def reject_wrong_keys(config: DictConfig) -> None:
    """Refuse keys that would be ignored: an own output_dir, unknown top-level keys that nothing refers to, and typos.

    Hydra recommends +key=value for every typo.
    """
    plain: Any = OmegaConf.to_container(config)
    if plain["output_dir"] != OUTPUT_DIR:
        raise UserError(f"output_dir={plain['output_dir']}: leave it out; hydra.run.dir=… sets the folder of a run")
    known = {*ROOT_KEYS, *ROOT_NODES, *(folder.name for folder in CONF.iterdir())}
    keys = [key for key in list_keys(config) if key.partition(".")[0] in known]
    for key, node in plain.items():
        if key in ("experiment", "sweep", "debug"):
            raise UserError(f"conf/{key}: the first line of its file must be # @package _global_")
        if key not in known and ("." in key or f"${{{key}" not in str(plain)):
            name = next((name for name, _ in iterate_items(node, key)), key)
            raise UserError(f"{key}: write nested keys" if "." in key else describe_unknown_key(name, keys))
    overrides = plain["hydra"]["overrides"]["task"]
    added = {item.lstrip("+").partition("=")[0] for item in overrides if item.startswith("+")}
    for key in re.findall(r"(?m)^\+([^+=\n]+)=(?!\{)", "\n".join(overrides)):
        section = key.rpartition(".")[0]
        siblings = [name for name in keys if name.rpartition(".")[0] == section and name not in added]
        if find_closest(key, siblings, cutoff=0.9):
            raise UserError(describe_unknown_key(key, siblings))


def find_closest(key: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """Return the known key that `key` most likely meant; its last part alone, as in max_epochs, counts as well."""

    def similarity(candidate: str) -> float:
        full = SequenceMatcher(None, key, candidate).ratio()
        last = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return max(full, 0.95 * last)  # a little less for the last part, so that the full key wins if both match

    best = max(known, key=similarity, default=None)
    return best if best is not None and similarity(best) >= cutoff else None


def _is_allowed(target: Any, packages: Sequence[str]) -> bool:
    if not isinstance(target, str) or ALLOWED_TARGETS.fullmatch(target):
        return isinstance(target, str)
    module, _, name = target.rpartition(".")
    package = module.partition(".")[0]
    if package in packages and re.fullmatch(r"\w+(\.\w+)+", target):
        try:
            attribute = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"_target_={target}: {error}") from error
        # The object must be defined in the package itself, not merely imported by it.
        return str(getattr(attribute, "__module__", "")).partition(".")[0] == package
    definition = _parse_definitions(module).get(name)
    if isinstance(definition, ast.FunctionDef):
        return bool(BUILDER_RETURN.fullmatch(ast.unparse(definition.returns or ast.Name(""))))
    return definition is not None


@cache
def _parse_definitions(module: str) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Return what a module of this project defines and a config may name, without importing it."""
    base = ROOT.joinpath(*module.split("."))
    files = [file for file in (base.with_suffix(".py"), base / "__init__.py") if file.is_file()]
    if not files or not re.fullmatch(rf"{PACKAGE}(?!\.(cli|core|sweeps|benchmark)\b)(\.[a-z_]\w*)+", module):
        return {}
    body = ast.parse(files[0].read_text(encoding="utf-8")).body
    nodes = [node for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return {node.name: node for node in nodes if not node.name.startswith("_")}


@cache
def get_annotations(target: str) -> dict[str, Any]:
    """Return the annotation of each argument of a class or function by name, None where there is no rule.

    The key "**" means that further arguments are accepted.
    """
    module, _, name = target.rpartition(".")
    definition: Any = _parse_definitions(module).get(name)
    if isinstance(definition, ast.ClassDef):
        methods = (node for node in definition.body if isinstance(node, ast.FunctionDef))
        definition = next((method for method in methods if method.name == "__init__"), None)
    if definition is None:
        return (LIBRARY_ARGUMENTS.get(target) or LIBRARY_ARGUMENTS.get(f"{module}.*") or {}) | {"**": Any}
    arguments = definition.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    annotations = {argument.arg: _evaluate(argument.annotation) for argument in named if argument.arg != "self"}
    return annotations | ({"**": Any} if arguments.kwarg else {})


def _evaluate(annotation: ast.expr | None) -> Any:
    names = vars(value_types) | {"Sequence": Sequence, "Literal": Literal}
    try:
        return eval(ast.unparse(annotation), names) if annotation else None  # source of this project
    except (NameError, TypeError, AttributeError):  # a class that would have to be imported
        return None
