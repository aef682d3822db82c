"""Check a composed config: which classes it may name, which values their arguments take, what a typo meant.

The rules are the annotations of the arguments themselves (src.core.value_types).
"""

import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from src.core.allowed_targets import get_parameters
from src.core.errors import UserError
from src.core.process import import_lightning
from src.core.value_types import LIBRARY_ARGUMENTS, NODE_KEYS, REFUSED_TARGETS, ROOT_KEYS, describe, is_valid

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
OUTPUT_DIR = "${hydra:runtime.output_dir}"
PACKAGE = __name__.partition(".")[0]
# Metrics of which lower values are better, by their names. "neg_" turns any name into its opposite.
LOWER_IS_BETTER = re.compile(
    r"(loss|losses|errors?|mse|mae|mape|perplexity|entropy|divergence|distance(?!_intersection)|deviance|regret|latency"
    r"|deviation|variation|disparity|cost|(edit|miss|false_\w+)_rate|fall_?out|info_lost|hinge|huber"
    r"|hausdorff|wasserstein|chamfer|perceptual_image_patch_similarity|ranked_probability_score)(?![a-z])"
    r"|(?<![a-z])(err|rmsle|nll|ppl|bp[cd]|cer|wer|ter|eer|fid|kl|ece|brier|lpips|emd|crps|angle)(?![a-z])",
    re.IGNORECASE,
)
NEGATED = re.compile(r"(?<![a-z])neg(ative)?_(?!rate)", re.IGNORECASE)


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
    """Raise UserError for a class that a resolved config may not name, or a value that an argument does not take."""
    plain: Any = OmegaConf.to_container(config)
    for name, value in plain.items():
        _validate_value(name, value, ROOT_KEYS.get(name, Any))
    for key, node in iterate_items(plain):
        if isinstance(node, dict) and "_target_" in node:
            import_lightning()  # before the target imports it
            _validate_arguments(key, node)


def _validate_arguments(key: str, node: dict[str, Any]) -> None:
    target = str(node["_target_"])
    if fix := REFUSED_TARGETS.get(target):
        raise UserError(f"{key}: leave it out; {fix}")
    parameters = get_parameters(target)
    narrower = next((rules for prefix, rules in LIBRARY_ARGUMENTS.items() if target.startswith(prefix)), {})
    rules = {name: narrower.get(name, parameter.annotation) for name, parameter in parameters.items()}
    rules |= NODE_KEYS.get(key, {})
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in [name for name in node if not str(name).startswith("_")]:
        if name not in rules and not takes_all:
            match = find_closest(str(name), list(rules))
            hint = f"did you mean {key}.{match}?" if match else f"it has {', '.join(rules) or 'none'}"
            raise UserError(f"{key}.{name}: {target.rpartition('.')[2]} has no such argument; {hint}")
        if name not in parameters or node[name] != parameters[name].default:
            _validate_value(f"{key}.{name}", node[name], rules.get(name, Any))


def _validate_value(key: str, value: Any, annotation: Any) -> None:
    if not is_valid(value, annotation):
        raise UserError(f"{key}={value}: must be {describe(annotation)}")


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
    hint = f"did you mean {match}?" if match else "python -m src.train --cfg job prints all keys"
    return f"{key}: no such key; {hint}"


def reject_wrong_keys(config: DictConfig) -> None:
    """Refuse keys that would be ignored: an own output_dir, and unknown top-level keys that nothing refers to."""
    plain: Any = OmegaConf.to_container(config)
    if plain["output_dir"] != OUTPUT_DIR:
        raise UserError(f"output_dir={plain['output_dir']}: leave it out; hydra.run.dir=… sets the folder of a run")
    known = {"hydra", *ROOT_KEYS, *(folder.name for folder in CONF.iterdir())}
    for key, node in plain.items():
        if key in ("experiment", "sweep", "debug"):
            raise UserError(f"conf/{key}: the first line of its file must be # @package _global_")
        if key not in known and ("." in key or f"${{{key}" not in str(plain)):
            name = next((name for name, _ in iterate_items(node, key)), key)
            keys = [key for key in list_keys(config) if key.partition(".")[0] in known]
            raise UserError(f"{key}: write nested keys" if "." in key else describe_unknown_key(name, keys))


def find_closest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that `key` most likely meant; its last part alone, as in lr, counts as well."""
    last_parts = {name.rpartition(".")[2]: name for name in reversed(known)}
    if matches := get_close_matches(key, known, n=1):
        return matches[0]
    matches = get_close_matches(key.rpartition(".")[2], last_parts, n=1)
    return last_parts[matches[0]] if matches else None
