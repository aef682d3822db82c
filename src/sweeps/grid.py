"""The jobs of a sweep: a grid over the values of its keys, in which some keys may change together."""

from collections.abc import Sequence
from itertools import chain, product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from src.core.compat import get_basic_sweeper
from src.core.errors import UserError


def list_jobs(overrides: Sequence[str], zipped: Sequence[str] = ()) -> list[list[str]]:
    """Return the overrides of each job. Raise UserError for `zipped` keys that cannot change together."""
    split, parsed = get_basic_sweeper().split_arguments, OverridesParser.create().parse_overrides(list(overrides))
    # By key a list of its values, each a list of one override, or of one per zipped key.
    values = {override.key_or_group: split([override], None)[0] for override in parsed}
    counts = {key: len(values.get(key, ())) for key in zipped}
    if len({*counts.values()}) > 1 or 0 in counts.values():
        numbers = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise UserError(f"hydra.callbacks.sweep.zip: its keys must have the same number of values; {numbers}")
    if zipped:
        together = zip(*(values.pop(key) for key in zipped), strict=True)
        values["zip"] = [list(chain(*parts)) for parts in together]
    return [list(chain(*parts)) for parts in product(*values.values())]


def list_jobs_of_sweep(hydra: Any) -> list[list[str]]:
    """Return the overrides of each job of the sweep with this `hydra` section, that of its multirun.yaml."""
    params = [f"{key}={value}" for key, value in (hydra["sweeper"].get("params") or {}).items()]
    return list_jobs([*params, *hydra["overrides"]["task"]], hydra["callbacks"]["sweep"].get("zip") or ())
