"""Search instead of sweeping a grid: python -m src.tune. The keys are in conf/tune.yaml and conf/train.yaml."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from src.cli.hydra_main import hydra_main
from src.core.errors import UserError
from src.train import train

if TYPE_CHECKING:
    from omegaconf import DictConfig


def tune(cfg: DictConfig) -> None:
    """Run trials of src.train until the study has `n_trials` of them, then report them."""
    # Imported here, so that --help, --cfg and a typo do not wait for Optuna and PyTorch.
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    from src.sweeps.optuna_study import open_study, optimize, run_trial
    from src.sweeps.report import write_report
    from src.training.console import silence_routine_output

    if any(override.startswith("hydra.sweep.") for override in HydraConfig.get().overrides.hydra):
        raise UserError("hydra.sweep: is for src.train -m; set study_name=… or hydra.run.dir=… for a study")
    silence_routine_output()
    folder = Path(cfg.output_dir)
    study = open_study(cfg, folder, HydraConfig.get().overrides.task)
    optimize(study, lambda trial: run_trial(trial, train, cfg.search, folder), cfg.n_trials)
    write_report([folder], folder)


def accept_new_keys(override: str) -> list[str]:
    """Return overrides that replace search, sampler or pruner, or a part of it, whichever keys it had before."""
    key, _, value = override.lstrip("+").partition("=")
    if not re.fullmatch(r"(search|sampler|pruner)(\.[\w.]+)?", key) or (key == "search" and not value.startswith("{")):
        return [override]
    plus = "" if key in ("sampler", "pruner") else "++"
    replaced = ["~search" if key == "search" else f"{plus}{key}=null"] if value.startswith("{") else []
    return [*replaced, f"{plus}{key}={value}"]


def main() -> None:
    """Run `tune` as a Hydra program."""
    sys.argv[1:] = [word for override in sys.argv[1:] for word in accept_new_keys(override)]
    hydra_main("tune", tune)()


if __name__ == "__main__":
    main()
