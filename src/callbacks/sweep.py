"""What Hydra does around the jobs of a multirun."""

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class Sweep(Callback):
    """Names each job's folder by the swept keys alone: overrides that all jobs share say nothing."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        overrides = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        swept = {override.key_or_group for override in overrides if override.is_sweep_override()}
        shared = {override.key_or_group for override in overrides} - swept
        # Every job's own config is composed anew from this list of Hydra overrides.
        config.hydra.overrides.hydra.append(
            f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(shared))}]"
        )
