"""Record a run: hyperparameters for the loggers, metrics.json with the final scores and where they come from."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Sized
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from src.core.compat import get_log_step
from src.core.config import iterate_items
from src.core.files import write_atomically
from src.core.run_folder import METRICS_FILE, read_file, write_config
from src.training.checkpoints import find_monitored_checkpoint, load_weights_only

PACKAGES = "torch", "torchvision", "lightning", "hydra-core", "torchmetrics"
CHOICES = "experiment", "data", "model", "task", "optimizer", "scheduler"
# Without _target_, items of lists, and max_lr and T_max, which repeat optimizer.lr and trainer.max_epochs.
HYPERPARAMETERS = re.compile(
    r"(model|task|optimizer|scheduler|data\.augment)(\.(?!max_lr|T_max)[a-zA-Z]\w*)+"
    r"|data\.batch_size|trainer\.max_\w+|seed"
)


class RunRecorder(Timer):
    """Log the hyperparameters, and measure the seconds of all parts of a resumed run; trainer.max_time ends it."""

    def __init__(self, cfg: DictConfig) -> None:
        plain: Any = OmegaConf.to_container(cfg.trainer)
        super().__init__(plain.get("max_time"))  # a Trainer ignores its own max_time beside a Timer
        self.cfg = cfg
        self.overrides, choices = _read_original_overrides(cfg)
        self.choices = {group: str(choices.get(group) or "null") for group in CHOICES}
        self.samples = 0.0
        self.initial_weights: dict[str, Any] | None = None  # what src.training.checkpoints has loaded

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"initial_weights": self.initial_weights, "samples": self.samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.initial_weights, self.samples = state_dict["initial_weights"], state_dict["samples"]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        has_new_config = self.cfg.resume or not HydraConfig.initialized()  # perhaps trained longer, or in a notebook
        if has_new_config and trainer.is_global_zero:
            write_config(self.cfg, Path(self.cfg.output_dir), self.overrides)
            Path(self.cfg.output_dir, METRICS_FILE).unlink(missing_ok=True)
        hyperparameters = _collect_hyperparameters(self.cfg, self.overrides) | self.choices
        if batch_size := getattr(trainer.datamodule, "train_batch_size", None):  # type: ignore[attr-defined]
            hyperparameters["data.batch_size"] = batch_size  # null in the config
        for logger in trainer.loggers:
            logger.log_hyperparams(hyperparameters)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_end(trainer, pl_module)
        loader = trainer.train_dataloader  # gone once the run is tested
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized):
            samples_per_batch = len(loader.dataset) / len(loader)
            self.samples = trainer.fit_loop.epoch_loop.batch_progress.total.completed * samples_per_batch


def _read_original_overrides(cfg: DictConfig) -> tuple[list[str], dict[str, Any]]:
    """Return the overrides and the chosen options that a run was started with, changed by those of its resumption."""
    if not HydraConfig.initialized():  # in a notebook
        return [], {}
    hydra, folder = HydraConfig.get(), Path(cfg.output_dir, ".hydra")
    overrides, choices = list(hydra.overrides.task), dict(hydra.runtime.choices)
    if cfg.resume and hydra.mode == RunMode.RUN and (folder / "hydra.yaml").is_file():
        changes = [override for override in overrides if not override.startswith("resume=")]
        before, changed = read_file(folder / "overrides.yaml", list), [change.partition("=")[0] for change in changes]
        overrides = [*(item for item in before if item.partition("=")[0] not in changed), *changes]
        choices = read_file(folder / "hydra.yaml")["hydra"]["runtime"]["choices"]
    return overrides, choices


def _collect_hyperparameters(cfg: DictConfig, overrides: list[str]) -> dict[str, bool | int | float | str]:
    """Return what shapes the training, and what the command line set, as plain values."""
    overridden = {override.key_or_group for override in OverridesParser.create().parse_overrides(overrides)}
    plain: dict[str, bool | int | float | str] = {}
    for key, value in iterate_items(OmegaConf.to_container(cfg)):
        if (HYPERPARAMETERS.fullmatch(key) or key in overridden) and not isinstance(value, dict):
            plain[key] = value if isinstance(value, bool | int | float) else "null" if value is None else str(value)
    return plain


def test_weights(trainer: L.Trainer, module: L.LightningModule, data: Any, choice: str | bool) -> dict[str, Any]:
    """Test the last weights and, for "best", those of the best epoch; return all scores, those as test/best/NAME."""
    trainer.test(module, data, verbose=False)
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    if choice != "best":
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
        logger.save()
    return metrics | scores


def write_results(recorder: RunRecorder, trainer: L.Trainer, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """Write metrics.json, whose presence means that the run is finished, and return its content.

    It has the scores of the final epoch (epochs count from 1) and what they come from: settings, hardware, versions.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    seconds, test_seconds = recorder.time_elapsed(), recorder.time_elapsed("test")
    best = checkpoint.best_model_path if (checkpoint := find_monitored_checkpoint(trainer)) else None
    results = {
        "name": recorder.cfg.name,
        "overrides": recorder.overrides,
        "choices": recorder.choices,
        "data": data.spec.name if hasattr(data, "spec") else getattr(data, "name", None) or type(data).__name__,
        "seed": recorder.cfg.seed,
        "threads": recorder.cfg.threads,
        "init_from": recorder.initial_weights,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "epochs": trainer.current_epoch,
        "best_epoch": load_weights_only(Path(best))["epoch"] + 1 if best else None,
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in sorted(metrics.items())},
        "seconds": {"fit": round(seconds, 3), "test": round(test_seconds, 3)},
        "samples_per_second": round(recorder.samples / seconds, 1) if recorder.samples else 0.0,
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
    name = re.search(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return f"{name[1] if name else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def _get_git_commit() -> str | None:
    """Return the commit of the project, followed by "-dirty" if files have changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with suppress(OSError):  # no git here
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip() or None
    return None


GIT_COMMIT = _get_git_commit()  # at the start of the run, because the checkout may change before it ends
