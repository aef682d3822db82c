"""Search instead of sweeping a grid: python -m src.tune. The keys are in conf/tune.yaml and conf/train.yaml."""

from __future__ import annotations

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

    from src.sweeps.optuna_study import count_trials, open_study, optimize, run_trial
    from src.sweeps.progress import SweepProgress
    from src.sweeps.report import write_report
    from src.training.console import silence_routine_output
    from src.training.instantiate import instantiate_node

    if any(override.startswith("hydra.sweep.") for override in HydraConfig.get().overrides.hydra):
        raise UserError("hydra.sweep: is for src.train -m; set study_name=… or hydra.run.dir=… for a study")
    silence_routine_output()
    if (processes := instantiate_node("trainer", cfg.trainer, logger=False).world_size) > 1:
        raise UserError(f"trainer.devices: a trial trains on one device, not {processes}; set trainer.devices=1")
    folder = Path(cfg.output_dir)
    study = open_study(cfg, folder)
    print(f"{count_trials(study)} of {cfg.n_trials} trials are done, ranked by {cfg.optimized_metric}")
    with SweepProgress(folder, cfg.n_trials, HydraConfig.get().overrides.task):
        optimize(study, lambda trial: run_trial(trial, train, cfg.search, folder), cfg.n_trials)
    write_report([folder], folder)


main = hydra_main("tune", tune)

if __name__ == "__main__":
    main()
