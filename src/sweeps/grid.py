"""The jobs of a sweep: a grid over the values of its keys, in which some keys may change together."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, product
from typing import Any

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from src.core.compat import get_basic_sweeper
from src.core.config import CONF, resolve_and_validate, validate_config
from src.core.errors import UserError


@contextmanager
def _use_config_loader() -> Iterator[Any]:
    """Return Hydra's config loader, also in a program that Hydra does not run."""
    is_running = GlobalHydra.instance().is_initialized()
    with nullcontext() if is_running else initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def list_jobs(overrides: Sequence[str], zipped: Sequence[str] = ()) -> list[list[str]]:
    """Return the overrides of each job. Raise UserError for `zipped` keys that cannot change together."""
    split = get_basic_sweeper().split_arguments
    with _use_config_loader() as loader:  # it knows what a glob(…) matches
        parsed = OverridesParser.create(loader).parse_overrides(list(overrides))
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


def reject_shared_folders(pattern: str, jobs: list[list[str]], jobs_before: list[list[str]]) -> None:
    """Raise UserError if hydra.sweep.subdir, not yet resolved, may put two jobs, of now or before, into one folder."""
    swept = dict.fromkeys(item.partition("=")[0] for job in jobs for item in job if item not in jobs[0])
    missing = [key for key in swept if not re.search(rf"({{|choices\.){re.escape(key)}}}", pattern)]
    is_named, is_numbered = "override_dirname" in pattern or not missing, "job.num" in pattern
    if not is_named and not is_numbered:
        reason = f"jobs would share folders, because it lacks {', '.join(missing)}"
        raise UserError(f"hydra.sweep.subdir={pattern}: {reason}; use ${{hydra.job.override_dirname}} in it")
    if not is_named and any(job != before for job, before in zip(jobs, jobs_before, strict=False)):
        raise UserError(f"hydra.sweep.subdir={pattern}: other jobs have these numbers already; choose another folder")


def validate_jobs(config: DictConfig, jobs: list[list[str]]) -> None:
    """Compose one job per combination of config groups, and validate each value of the others once.

    Raises UserError for a value that is not allowed.
    """
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    for job in jobs:
        keys = {item: re.split("[=@]", item.lstrip("+~"))[0] for item in job}
        alike.setdefault(tuple(item for item, key in keys.items() if (CONF / key).is_dir()), []).append(job)
    for first, *others in alike.values():
        with _use_config_loader() as loader:
            composed = loader.load_sweep_config(config, first)
        with open_dict(composed):
            composed.hydra.job.update(num=0, id="0")
            composed.hydra.runtime.output_dir = composed.output_dir = "."
            HydraConfig.instance().set_config(composed)
            del composed["hydra"]
        resolved = resolve_and_validate(composed)
        values = dict.fromkeys(item for job in others for item in job if item not in first)
        for override in OverridesParser.create().parse_overrides(list(values)):
            part = OmegaConf.masked_copy(resolved, [override.key_or_group.partition(".")[0]])
            OmegaConf.update(part, override.key_or_group, override.value(), force_add=True)
            validate_config(part)
