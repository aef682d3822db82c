"""Searches instead of sweeping a grid: python -m src.tune. The keys are in conf/tune.yaml and conf/train.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING

from src.cli.hydra_main import hydra_main  # the first import: of the file by its path it says how it is started
from src.core.errors import UserError
from src.train import train

if TYPE_CHECKING:
    from omegaconf import DictConfig


def tune(cfg: DictConfig) -> None:
    # Here, because --help, --cfg and a typing mistake should not wait for Optuna and PyTorch.
    from pathlib import Path

    from hydra.core.hydra_config import HydraConfig

    if any(one.startswith("hydra.sweep.") for one in HydraConfig.get().overrides.hydra):
        raise UserError(
            "hydra.sweep is for src.train -m; a study is in outputs/NAME/STUDY_NAME: set study_name=… or hydra.run.dir=…"
        )

    from src.sweeps.optuna_study import COUNTED, count, open_study, optimize, run_trial
    from src.sweeps.progress import SweepProgress
    from src.sweeps.report import report
    from src.training.console import silence_routine_output
    from src.training.instantiate import instantiate_node

    silence_routine_output()
    if (
        processes := instantiate_node("trainer", cfg.trainer, logger=False).world_size
    ) > 1:  # each would draw settings of its own
        raise UserError(f"a trial trains on one device, not on {processes}; set trainer.devices=1 trainer.num_nodes=1")
    folder = Path(cfg.output_dir)
    study = open_study(cfg, folder)
    print(f"{count(study, *COUNTED)} of {cfg.n_trials} trials are done, told by {cfg.optimized_metric}")
    with SweepProgress(folder, cfg.n_trials, HydraConfig.get().overrides.task) as watch:
        optimize(study, lambda trial: run_trial(trial, train, cfg.search, folder), cfg.n_trials, folder, watch.look)
    report([folder], folder)


main = hydra_main("tune", tune)

if __name__ == "__main__":
    main()
