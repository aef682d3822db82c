"""Whether two configs mean the same experiment: finished work may only be counted where they do."""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from src.errors import UserError


def flat(config: DictConfig | ListConfig) -> dict[str, Any]:
    """Leaves by dotted key, interpolations as they are written; Hydra's own keys left out."""

    def walk(node: Any, prefix: str) -> dict[str, Any]:
        if not isinstance(node, dict):
            return {prefix: node}
        return {key: leaf for name in node for key, leaf in walk(node[name], f"{prefix}.{name}").items()}

    container = OmegaConf.to_container(config)
    assert isinstance(container, dict)
    container.pop("hydra", None)
    return {key.removeprefix("."): leaf for key, leaf in walk(container, "").items()}


def refuse_other(before: dict[str, Any], now: dict[str, Any], place: str, fix: str) -> None:
    """Raises UserError for the first key in which the two flat configs differ."""
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key):
            raise UserError(f"{place} was begun with {key}={before.get(key)}, here it is {now.get(key)}; {fix}")
