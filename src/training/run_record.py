"""Record a run: hyperparameters for the loggers, metrics.json with the final scores and where they come from."""

import json
import platform
import re
from importlib.metadata import version
from pathlib import Path
from subprocess import getstatusoutput
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from src.core.config import ROOT, iterate_items
from src.core.files import write_atomically
from src.core.run_folder import METRICS_FILE, make_portable, read_file, write_config
from src.training.checkpoints import find_monitored_checkpoint, load_weights_only

PACKAGES = "torch", "torchvision", "lightning", "hydra-core", "torchmetrics"
CHOICES = "experiment", "data", "model", "task", "optimizer", "scheduler"
# Without paths, _target_ and items of lists; all would be axes of TensorBoard's HParams tab.
HYPERPARAMETERS = re.compile(r"((model|task|optimizer|scheduler|data(?!\.root)|trainer\.max_\w+|seed)(\.[a-zA-Z]\w*)*)")
# At the start of the run, because the checkout may change before it ends.
GIT_STATUS, GIT_COMMIT = getstatusoutput(f'git -C "{ROOT}" describe --always --dirty --abbrev=40 --exclude="*"')


class RunRecorder(Timer):
    """Log the hyperparameters, and measure the seconds of all parts of a resumed run; trainer.max_time ends it."""

    def __init__(self, cfg: DictConfig) -> None:
        plain: Any = OmegaConf.to_container(cfg.trainer)
        super().__init__(plain.get("max_time"))  # a Trainer ignores its own max_time beside a Timer
        self.cfg = cfg
        file = Path(cfg.output_dir, ".hydra/hydra.yaml")  # of the first start of a resumed run; none in a notebook
        choices = read_file(file)["hydra"]["runtime"]["choices"] if file.is_file() else {}
        self.choices = {group: str(choices.get(group) or "null") for group in CHOICES}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        has_new_config = self.cfg.resume or not HydraConfig.initialized()  # perhaps trained longer, or in a notebook
        if has_new_config and trainer.is_global_zero:
            overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
            changes = [override for override in overrides if not override.startswith("resume=")]
            write_config(self.cfg, Path(self.cfg.output_dir), changes)
            Path(self.cfg.output_dir, METRICS_FILE).unlink(missing_ok=True)
        items = [(key, value) for key, value in iterate_items(make_portable(self.cfg)) if not isinstance(value, dict)]
        leaves = {key: value for key, value in items if HYPERPARAMETERS.fullmatch(key)}
        plain = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in leaves.items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(plain | self.choices)


def test_weights(trainer: L.Trainer, module: L.LightningModule, data: Any, choice: str | bool) -> dict[str, Any]:
    """Test the last weights and, for "best", those of the best epoch; return all scores, those as test/best/NAME."""
    trainer.test(module, data, verbose=False)
    metrics: dict[str, Any] = dict(trainer.callback_metrics)
    best = find_monitored_checkpoint(trainer)
    if choice == "best" and best and best.best_model_path:
        # Not by trainer.test(ckpt_path=…), which would load the states of the callbacks as well.
        state = load_weights_only(Path(best.best_model_path))["state_dict"]
        module.load_state_dict(state, strict=module.strict_loading)
        trainer.loggers = []  # they have these names from the last weights
        trainer.test(module, data, verbose=False)
        metrics |= {f"test/best/{name.removeprefix('test/')}": x for name, x in trainer.callback_metrics.items()}
    return metrics


def write_results(recorder: RunRecorder, trainer: L.Trainer, metrics: dict[str, Tensor]) -> dict[str, Any]:
    """Write metrics.json, whose presence means that the run is finished, and return its content.

    It has the scores of the final epoch (epochs count from 1) and what they come from: settings, hardware, versions.
    """
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    seconds, test_seconds = recorder.time_elapsed(), recorder.time_elapsed("test")
    batches = trainer.world_size * trainer.fit_loop.epoch_loop.batch_progress.total.completed
    samples = batches * getattr(data, "train_batch_size", 0)  # known of images only
    best = checkpoint.best_model_path if (checkpoint := find_monitored_checkpoint(trainer)) else None
    results = {
        "name": recorder.cfg.name,
        "choices": recorder.choices,
        "data": data.spec.name if hasattr(data, "spec") else getattr(data, "name", None) or type(data).__name__,
        "seed": recorder.cfg.seed,
        "threads": recorder.cfg.threads,
        "init_from": read_file(file) if (file := Path(recorder.cfg.output_dir, "init_from.json")).is_file() else None,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "epochs": trainer.current_epoch,
        "best_epoch": load_weights_only(Path(best))["epoch"] + 1 if best else None,
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in sorted(metrics.items())},
        "seconds": {"fit": round(seconds, 3), "test": round(test_seconds, 3)},
        "samples_per_second": round(samples / seconds, 1) if samples else None,
        "device": get_device_name(trainer.strategy.root_device),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": None if GIT_STATUS else GIT_COMMIT,
    }
    if trainer.is_global_zero:
        file = Path(recorder.cfg.output_dir, METRICS_FILE)
        write_atomically(file, (json.dumps(results, indent=2) + "\n").encode())
    return results


def get_device_name(device: torch.device) -> str:
    """Return the name of the GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    file = Path("/proc/cpuinfo")  # on Linux
    name = re.search(r"model name\s*: (.*)", file.read_text(encoding="utf-8")) if file.is_file() else None
    return name[1] if name else f"{platform.machine()} {device.type}"
