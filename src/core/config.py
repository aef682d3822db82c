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

from src.core.allowed_targets import get_parameters
from src.core.errors import UserError
from src.core.process import import_lightning
from src.core.value_types import REFUSED_TARGETS, RULES, describe, is_valid

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
OUTPUT_DIR = "${hydra:runtime.output_dir}"
PACKAGE = __name__.partition(".")[0]
# Metrics of which lower values are better, by a part of their names.
LOWER_IS_BETTER = re.compile(
    r"loss|err(ors?)?(?![a-z])|msl?e|map?e(?![a-z])|perplex|entropy|distance"
    r"|(?<![a-z])(nll|ppl|[cwe]er|fid|kl|ece|brier|hinge|huber|lpips|bpd|cost)(?![a-z])",
    re.IGNORECASE,
)


def resolve_and_validate(config: DictConfig) -> DictConfig:
    """Resolve interpolations, then validate the config. Raises UserError."""
    config = resolve_config(config)
    validate_config(config)
    return config


def resolve_config(config: DictConfig) -> DictConfig:
    """Return the config without interpolations, so that what is validated is what is instantiated.

    Infer `optimized_mode` from the name of the metric if it is null. Outside a Hydra program the run folder is named
    here.
    """
    config = config.copy()
    if OmegaConf.is_interpolation(config, "output_dir") and not HydraConfig.initialized():
        config.output_dir = f"outputs/{config.name}/{datetime.now():%Y-%m-%d_%H-%M-%S-%f}"
    if "optimized_mode" in config and config.optimized_mode is None:
        config.optimized_mode = infer_mode(config.optimized_metric)
    result: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=True, throw_on_missing=True))
    OmegaConf.set_struct(result, True)
    return result


def infer_mode(metric: str | None) -> str:
    """Return "min" if the name of the metric says that lower is better, as in val/loss and test/rmse, else "max"."""
    return "min" if LOWER_IS_BETTER.search(str(metric)) and "neg_" not in str(metric) else "max"


def validate_config(config: DictConfig) -> None:
    """Raise UserError for a class that a resolved config may not name, or a value that an argument does not take."""
    for key, value in iterate_items(OmegaConf.to_container(config)):
        if key in RULES:
            _validate_value(key, value, RULES[key])
        if isinstance(value, dict) and "_target_" in value:
            import_lightning()  # before the target imports it
            _validate_arguments(key, value)


def _validate_arguments(key: str, node: dict[str, Any]) -> None:
    target = str(node["_target_"])
    if fix := REFUSED_TARGETS.get(target):
        raise UserError(f"{key}: leave it out; {fix}")
    parameters = get_parameters(target)
    takes_all = any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in (name for name in node if not str(name).startswith("_") and f"{key}.{name}" not in RULES):
        if name in parameters and node[name] != parameters[name].default:
            _validate_value(f"{key}.{name}", node[name], parameters[name].annotation)
        elif name not in parameters and not takes_all:
            match = find_closest(str(name), list(parameters))
            hint = f"did you mean {key}.{match}?" if match else f"it has {', '.join(parameters) or 'none'}"
            raise UserError(f"{key}.{name}: {target.rpartition('.')[2]} has no such argument; {hint}")


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
    roots = [re.findall(r"^\w+", file.read_text(encoding="utf-8"), re.M) for file in CONF.glob("*.yaml")]
    known = {folder.name for folder in CONF.iterdir()}.union(*roots)
    for key, node in plain.items():
        if key in ("experiment", "sweep", "debug"):
            raise UserError(f"conf/{key}: the first line of its file must be # @package _global_")
        if "." in key:
            raise UserError(f"{key}: write nested keys")
        if key not in known and f"${{{key}" not in str(plain):
            name = next((name for name, _ in iterate_items(node, key)), key)
            known_keys = [key for key in list_keys(config) if key.partition(".")[0] in known]
            raise UserError(describe_unknown_key(name, known_keys))


def find_closest(key: str, known: Sequence[str]) -> str | None:
    """Return the known key that `key` most likely meant; its last part alone, as in lr, counts as well."""
    names = {name.rpartition(".")[2]: name for name in reversed(known)} | {name: name for name in known}
    matches = get_close_matches(key, names, n=1)
    return names[matches[0]] if matches else None
