"""Search instead of sweeping a grid: python -m src.tune. The keys are in conf/tune.yaml and conf/train.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.cli.hydra_main import hydra_main
from src.train import train

if TYPE_CHECKING:
    from omegaconf import DictConfig


def tune(cfg: DictConfig) -> None:
    """Run trials of src.train until the study has `n_trials` of them, then report them."""
    # Imported here, so that --help, --cfg and a typo do not wait for Optuna and PyTorch.
    from pathlib import Path

    from src.sweeps.optuna_study import open_study, optimize, run_trial
    from src.sweeps.report import write_report
    from src.training.console import silence_routine_output

    silence_routine_output()
    folder = Path(cfg.output_dir)
    study = open_study(cfg, folder)
    optimize(study, lambda trial: run_trial(trial, train, cfg.search, folder), cfg.n_trials)
    write_report([folder], folder)


main = hydra_main("tune", tune)

if __name__ == "__main__":
    main()
