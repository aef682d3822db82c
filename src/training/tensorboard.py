"""TensorBoard's logger, with accuracies in percent."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.plugins.hparams.summary_v2 import hparams_pb


class PercentTensorBoardLogger(TensorBoardLogger):
    """Log accuracies in percent, and no curve of epoch numbers."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        percent = {f"{name} %": 100 * value for name, value in metrics.items() if name.endswith("/acc")}
        others = {name: value for name, value in metrics.items() if not name.endswith(("/acc", "epoch"))}
        super().log_metrics(percent | others, step)

    @rank_zero_only
    def log_hyperparams(self, params: Any, metrics: Any = None, step: int | None = None) -> None:
        """Fill the HParams tab, whose columns are then those of all runs.

        Lightning's method describes the whole experiment by one run. TensorBoard uses the first description that it
        finds and hides columns that it lacks; without any it looks at all runs.
        """
        folder = Path(self.log_dir)
        summary = hparams_pb(params, trial_id=f"{folder.name} in {folder.parent.name}")
        self.experiment.file_writer.add_summary(summary)
        self.hparams.update(params)  # for Lightning's hparams.yaml
