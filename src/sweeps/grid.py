"""The jobs of a sweep: a grid over the values of its keys, in which some keys may change together."""

from collections.abc import Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import OmegaConf

from src.core.compat import get_basic_sweeper
from src.core.errors import UserError

BasicSweeper = get_basic_sweeper()
ZIP = "hydra.callbacks.sweep.zip"


def list_jobs(overrides: Sequence[str], zipped: Sequence[str] = ()) -> list[list[str]]:
    """Return the overrides of each job. Raise UserError for `zipped` keys that cannot change together."""
    return _multiply(OverridesParser.create().parse_overrides(list(overrides)), zipped)


def _multiply(overrides: Sequence[Override], zipped: Sequence[str]) -> list[list[str]]:
    values = {item.key_or_group: BasicSweeper.split_arguments([item], None)[0] for item in overrides}
    counts = {key: len(values.get(key, ())) for key in zipped}
    if len(set(counts.values())) > 1 or 0 in counts.values():
        numbers = ", ".join(f"{key} has {count}" for key, count in counts.items())
        raise UserError(f"{ZIP}: keys that change together need the same number of values; {numbers}")
    if zipped:
        together = zip(*(values[key] for key in zipped), strict=True)
        values[zipped[0]] = [[item for part in parts for item in part] for parts in together]
    lists = [items for key, items in values.items() if key not in zipped[1:]]
    return [[item for part in parts for item in part] for parts in product(*lists)]


class GridSweeper(BasicSweeper):  # type: ignore[misc, valid-type]
    """Hydra's own sweeper with keys whose values change together."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        jobs = _multiply(overrides, OmegaConf.select(self.config, ZIP) or ())
        return list(self.split_overrides_to_chunks(jobs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Compose one job per combination of config groups: Hydra would compose each job twice."""
        get_options = self.hydra_context.config_loader.get_group_options

        def is_choice(override: str) -> bool:
            return bool(get_options(override.partition("=")[0].lstrip("+~").partition("@")[0]))

        try:
            super().validate_batch_is_legal(list({tuple(filter(is_choice, job)): job for job in batch}.values()))
        except Exception:
            folder = Path(self.config.hydra.sweep.dir)
            if not any(folder.glob("*/.hydra")):  # of a sweep that has not started
                (folder / "multirun.yaml").unlink(missing_ok=True)
            with suppress(OSError):  # not empty
                folder.rmdir()
            raise
