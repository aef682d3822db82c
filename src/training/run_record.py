"""Record a run: hyperparameters for the loggers, metrics.json with the final scores and where they come from."""

import json
import os
import platform
import subprocess
from collections.abc import Sized
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch import Tensor
from torch.utils.data import DataLoader

from src.core.compat import add_summary, continue_logger_run, get_log_step
from src.core.config import iterate_items
from src.core.errors import UserError
from src.core.files import write_atomically
from src.core.run_folder import METRICS_FILE, merge_overrides, read_strings, read_yaml, write_config
from src.training.checkpoints import find_monitored_checkpoint, load_weights_only

PACKAGES = "torch", "torchvision", "lightning", "hydra-core", "torchmetrics"
CHOICES = "experiment", "data", "model", "task", "optimizer", "scheduler"
HYPERPARAMETERS = ("model.", "task.", "optimizer.", "scheduler.", "data.augment.", "data.batch_size", "trainer.max_")
DERIVED = "scheduler.max_lr", "scheduler.T_max"  # interpolations of keys that are recorded themselves


class RunRecorder(Callback):
    """Measure the seconds of training without validation, and check that the optimized metric is logged.

    Raises UserError when it is clear that nothing logs what the config names as `optimized_metric`, or what a callback
    monitors.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.metric = cfg, cfg.optimized_metric
        self.overrides, self.choices = _read_original_overrides(cfg)
        if str(self.metric).startswith("test/"):
            raise UserError(
                f"optimized_metric={self.metric}: a test score must not choose anything; set val/acc or null"
            )
        self.seconds, self.started_at = {"train": 0.0, "validate": 0.0}, 0.0  # of all parts of a resumed run
        self.samples, self.first_epoch, self.has_validated = 0.0, 0, False
        self.initial_weights: dict[str, Any] | None = None  # what src.training.checkpoints has loaded

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "initial_weights": self.initial_weights, "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update(state_dict)

    def _stop_clock(self, stage: str) -> None:
        now = perf_counter()
        self.seconds[stage] += now - self.started_at
        self.started_at = now

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        has_new_config = self.cfg.resume or not HydraConfig.initialized()  # perhaps trained longer, or in a notebook
        if has_new_config and trainer.is_global_zero:
            write_config(self.cfg, Path(self.cfg.output_dir), self.overrides)
            Path(self.cfg.output_dir, METRICS_FILE).unlink(missing_ok=True)
        _log_hyperparameters(trainer, self.cfg, _collect_hyperparameters(self.cfg, self.overrides, self.choices))
        self.first_epoch, self.started_at = trainer.current_epoch, perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stop_clock("train")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._stop_clock("validate")
            self.has_validated = True

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._stop_clock("train")  # before a checkpoint of this moment is written

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == self.first_epoch:
            return  # nothing has been logged yet
        monitors = {type(callback).__name__: getattr(callback, "monitor", None) for callback in trainer.callbacks}  # type: ignore[attr-defined]
        for key, name in {"optimized_metric": self.metric, **monitors}.items():
            if name and (self.has_validated or name.startswith("train/")):
                reject_missing_metric(key, name, trainer.callback_metrics)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop_clock("train")
        loader = trainer.train_dataloader  # gone once the run is tested
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized):
            samples_per_batch = len(loader.dataset) / len(loader)
            self.samples = trainer.fit_loop.epoch_loop.batch_progress.total.completed * samples_per_batch


def reject_missing_metric(key: str, name: str, metrics: dict[str, Any]) -> None:
    """Raise UserError, with the names that there are, if the metric that a key names is not among `metrics`."""
    if name not in metrics:
        raise UserError(f"{key}={name}: not logged, logged are {', '.join(sorted(metrics))}; set one of them or null")


def _read_original_overrides(cfg: DictConfig) -> tuple[list[str], dict[str, Any]]:
    """Return the overrides and the chosen options that a run was started with, changed by those of its resumption."""
    if not HydraConfig.initialized():  # in a notebook
        return [], {}
    hydra, folder = HydraConfig.get(), Path(cfg.output_dir, ".hydra")
    overrides, choices = list(hydra.overrides.task), dict(hydra.runtime.choices)
    if cfg.resume and hydra.mode == RunMode.RUN and (folder / "hydra.yaml").is_file():
        changes = [override for override in overrides if not override.startswith("resume=")]
        overrides = merge_overrides(read_strings(folder / "overrides.yaml"), changes)
        choices = read_yaml(folder / "hydra.yaml")["hydra"]["runtime"]["choices"]
    return overrides, choices


def _collect_hyperparameters(cfg: DictConfig, overrides: list[str], choices: dict[str, Any]) -> dict[str, Any]:
    """Return what shapes the training, what the command line set, and the chosen config groups, as plain values."""
    overridden = {override.key_or_group for override in OverridesParser.create().parse_overrides(overrides)}
    plain: dict[str, bool | int | float | str] = {}
    for key, value in iterate_items(OmegaConf.to_container(cfg)):
        name = key.rpartition(".")[2]
        is_hyperparameter = key == "seed" or (key.startswith(HYPERPARAMETERS) and not name.startswith("_"))
        is_shown = is_hyperparameter and not name.isdigit() and key not in DERIVED
        if (is_shown or key in overridden) and not isinstance(value, dict):
            plain[key] = value if isinstance(value, bool | int | float) else "null" if value is None else str(value)
    return plain | {group: str(choices.get(group) or "null") for group in CHOICES}


@rank_zero_only
def _log_hyperparameters(trainer: L.Trainer, cfg: DictConfig, plain: dict[str, Any]) -> None:
    """Log hyperparameters to every logger, to TensorBoard's HParams tab without an experiment description.

    Lightning's and PyTorch's own methods describe the whole experiment by one run. TensorBoard uses the first
    description that it finds and hides columns that it lacks; without any it looks at all runs.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "train_batch_size"):  # data.batch_size may be null
        plain["data.batch_size"] = data.train_batch_size
    folder = Path(cfg.output_dir)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            add_summary(logger.experiment, hparams_pb(plain, trial_id=f"{folder.name} in {folder.parent.name}"))
            logger.hparams.update(plain)
            logger.save()
        else:
            logger.log_hyperparams(plain)


def continue_logger_runs(loggers: list[Any], folder: Path, is_resumed: bool) -> None:
    """Let W&B and MLflow continue their own run when a run is resumed: its id is kept in the run folder."""
    for logger in loggers:
        file = folder / f".{type(logger).__name__}"
        if isinstance(logger, WandbLogger | MLFlowLogger):
            if is_resumed and file.is_file():
                continue_logger_run(logger, file.read_text(encoding="utf-8"))
            elif getattr(rank_zero_only, "rank", 0) == 0:
                logger.experiment  # noqa: B018  (begins the run)
                file.write_text(
                    str(logger.version if isinstance(logger, WandbLogger) else logger.run_id), encoding="utf-8"
                )


def finish_loggers(trainer: L.Trainer) -> None:
    """Save what was logged, also if the start was refused; end the run of W&B, of which a process has one at a time."""
    for logger in trainer.loggers:
        logger.save()
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()


def test(trainer: L.Trainer, module: L.LightningModule, data: Any, weights: str | bool) -> dict[str, Any]:
    """Test the last weights and, for "best", those of the best epoch; return all scores, those as test/best/NAME."""
    trainer.test(module, data, verbose=False)
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    if weights != "best":
        return metrics
    if not (best := find_monitored_checkpoint(trainer)) or not best.best_model_path:
        rank_zero_warn("test=best: no validation has ended, so only the last weights were tested")
        return metrics
    # Not by trainer.test(ckpt_path=…), which would load the states of the callbacks as well.
    state = load_weights_only(Path(best.best_model_path))["state_dict"]
    module.load_state_dict(state, strict=module.strict_loading)
    loggers, trainer.loggers = trainer.loggers, []  # they have these names from the last weights
    trainer.test(module, data, verbose=False)
    trainer.loggers = loggers
    scores = {f"test/best/{name.removeprefix('test/')}": float(x) for name, x in trainer.callback_metrics.items()}
    for logger in loggers:
        logger.log_metrics(scores, get_log_step(trainer))
    return metrics | scores


def write_results(
    recorder: RunRecorder, trainer: L.Trainer, metrics: dict[str, Tensor], test_seconds: float
) -> dict[str, Any]:
    """Write metrics.json, whose presence means that the run is finished, and return its content.

    It has the scores of the final epoch (epochs count from 1) and what they come from: settings, hardware, versions.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    best = checkpoint.best_model_path if (checkpoint := find_monitored_checkpoint(trainer)) else None
    results = {
        "name": recorder.cfg.name,
        "overrides": recorder.overrides,
        "choices": {group: str(recorder.choices.get(group) or "null") for group in CHOICES},
        "data": data.spec.name if hasattr(data, "spec") else getattr(data, "name", None) or type(data).__name__,
        "seed": recorder.cfg.seed,
        "threads": recorder.cfg.threads,
        "init_from": recorder.initial_weights,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "epochs": trainer.current_epoch,
        "best_epoch": load_weights_only(Path(best))["epoch"] + 1 if best else None,
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in sorted(metrics.items())},
        "seconds": {"fit": round(sum(recorder.seconds.values()), 3), "test": round(test_seconds, 3)},
        "samples_per_second": round(recorder.samples / recorder.seconds["train"], 1) if recorder.samples else 0.0,
        "device": get_device_name(trainer.strategy.root_device),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),  # null: all of the machine's
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": GIT_COMMIT,
    }
    if trainer.is_global_zero:
        file = Path(recorder.cfg.output_dir, METRICS_FILE)
        write_atomically(file, (json.dumps(results, indent=2) + "\n").encode())
    return results


def get_device_name(device: torch.device) -> str:
    """Return the name of the GPU, or of the processor with the number of PyTorch's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()}, mps"
    file = Path("/proc/cpuinfo")  # on Linux
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = (line.split(": ")[1] for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor() or platform.machine())}, {torch.get_num_threads()} threads"


def _get_git_commit() -> str | None:
    """Return the commit of the project, followed by "-dirty" if files have changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):  # no git here
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


GIT_COMMIT = _get_git_commit()  # at the start of the run, because the checkout may change before it ends
