"""What a run leaves behind for people and programs: metrics.json."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from torch import Tensor
from torch.utils.data import DataLoader

from src.core.compat import add_summary, continue_logger_run
from src.core.config import iterate_items
from src.core.errors import UserError
from src.core.files import list_tree, remove_new_files
from src.core.run_folder import compute_digest, get_choices, make_portable, read_strings, read_yaml

PACKAGES = "torch", "torchvision", "lightning", "hydra-core", "torchmetrics"
METRICS_FILE = "metrics.json"
DERIVED = "scheduler.max_lr", "scheduler.T_max"  # from keys that are shown themselves


class RunRecorder(Callback):
    """The seconds of training without validation, and in each checkpoint the digest of the run's config.

    Raises UserError once it is clear that nothing logs what the config calls `optimized_metric`.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg, self.metric, self.digest = cfg, cfg.optimized_metric, compute_digest(make_portable(cfg))
        self.overrides, _ = get_original_overrides(cfg)
        if str(self.metric).startswith("test/"):
            raise UserError(
                f"optimized_metric={self.metric}: by a score on the test images nothing may be chosen; "
                "set optimized_metric=val/acc, or null"
            )
        self.seconds, self.since, self.samples = 0.0, 0.0, 0.0

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.digest

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if str(self.metric).startswith("val/") and not reaches_validation(trainer):
            raise UserError(
                f"optimized_metric={self.metric}: this run ends before its first validation; let it validate sooner "
                "or train longer, or set optimized_metric=null"
            )
        log_hyperparameters(trainer, self.cfg)  # not before: a start that fails leaves no folder
        self.first, self.since = trainer.current_epoch, perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:  # which comes before the training
            self.seconds += perf_counter() - self.since

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.since = perf_counter()
        self._check(trainer, lambda name: name.startswith("val/"))  # before the training, after the trainer's one batch

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch > self.first:
            self._check(trainer, lambda name: True)  # what is logged where an epoch ends is known then

    def _check(self, trainer: L.Trainer, among: Callable[[str], bool]) -> None:
        monitored = {f"{type(one).__name__}.monitor": getattr(one, "monitor", None) for one in trainer.callbacks}  # type: ignore[attr-defined]
        for key, name in {"optimized_metric": self.metric, **monitored}.items():
            if name and among(name) and name not in trainer.callback_metrics:
                raise UserError(f"{key}={name}: the run has " + ", ".join(sorted(trainer.callback_metrics)))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds += perf_counter() - self.since
        loader = trainer.train_dataloader  # gone once the run is tested
        if isinstance(loader, DataLoader) and isinstance(loader.dataset, Sized):  # a stream cannot tell
            images = len(loader.dataset) / len(loader)
            self.samples = trainer.fit_loop.epoch_loop.batch_progress.total.completed * images


def reaches_validation(trainer: L.Trainer) -> bool:
    """Whether a training comes to a validation, as far as can be told when it begins."""
    none_loaded = trainer.val_dataloaders is not None and not sum(trainer.num_val_batches)
    if none_loaded or not trainer.enable_validation:
        return False
    epoch, wait = trainer.num_training_batches, trainer.check_val_every_n_epoch or 1
    first = (wait - 1) * epoch + trainer.val_check_batch  # type: ignore[operator]
    ends: list[float] = [trainer.max_steps * trainer.accumulate_grad_batches] if trainer.max_steps != -1 else []
    ends += [trainer.max_epochs * epoch] if trainer.max_epochs not in (None, -1) else []  # type: ignore[operator]
    return first == math.inf or first <= min(ends, default=math.inf)


def get_optimized_metric(results: dict[str, Any], name: str | None) -> float | None:
    """The score that a search looks at; None where there is none to look at."""
    if name is not None and name not in results["metrics"]:
        raise UserError(f"optimized_metric={name}: the run has " + ", ".join(results["metrics"]))
    return float(results["metrics"][name]) if name is not None else None


def is_hyperparameter(key: str) -> bool:
    groups = "model.", "task.", "optimizer.", "scheduler.", "data.augment.", "data.batch_size", "trainer.max_"
    last = key.rpartition(".")[2]
    shown = not last.startswith("_") and not last.isdigit() and key not in DERIVED
    return key == "seed" or (key.startswith(groups) and shown)


def get_original_overrides(cfg: DictConfig) -> tuple[list[str], dict[str, Any]]:
    """The overrides that a run was begun with, and its options by group. Raises UserError where its file is damaged."""
    hydra, own = HydraConfig.get(), Path(cfg.output_dir, ".hydra/hydra.yaml")
    if not cfg.resume or not own.parent.is_dir():
        return list(hydra.overrides.task), dict(hydra.runtime.choices)
    return read_strings(own, "hydra", "overrides", "task"), get_choices(
        read_yaml(own)
    )  # who continues a run names none of these


def collect_hyperparameters(cfg: DictConfig) -> dict[str, bool | int | float | str]:
    """What shapes the training, what the command line set, and the chosen config groups, as plain values."""
    begun_with, choices = get_original_overrides(cfg)
    overrides = OverridesParser.create().parse_overrides(begun_with)
    leaves = {key: x for key, x in iterate_items(OmegaConf.to_container(cfg)) if not isinstance(x, dict)}
    plain: dict[str, bool | int | float | str] = {}
    for key in [*filter(is_hyperparameter, leaves), *(override.key_or_group for override in overrides)]:
        if key in leaves:
            value = leaves[key]
            plain[key] = value if isinstance(value, bool | int | float) else "null" if value is None else str(value)
    for group in "experiment", "data", "model", "optimizer", "scheduler":
        plain[group] = str(choices.get(group) or "null")
    return plain


@rank_zero_only
def log_hyperparameters(trainer: L.Trainer, cfg: DictConfig) -> None:
    """Tells every logger; TensorBoard's HParams tab, whose metrics are the scalars that the run logs, in its own way.

    Lightning's and PyTorch's own ways also write a description of the whole experiment, made from one run;
    TensorBoard believes the first that it finds, and shows no column that it lacks. Without any it looks at all runs.
    """
    folder = Path(cfg.output_dir)
    plain = collect_hyperparameters(cfg)
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "train_batch_size"):  # the config may leave it to the data
        plain["data.batch_size"] = data.train_batch_size
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            add_summary(logger.experiment, hparams_pb(plain, trial_id=f"{folder.name} in {folder.parent.name}"))
            logger.hparams.update(plain)
            logger.save()
        else:
            logger.log_hyperparams(plain)


def continue_logger_runs(loggers: list[Any], folder: Path, resumed: bool) -> list[Any]:
    """W&B and MLflow name each run themselves, and begin another when it is resumed unless they are told its name."""
    for logger in loggers:
        file = folder / f".{type(logger).__name__}"
        if isinstance(logger, WandbLogger | MLFlowLogger):
            if resumed and file.is_file():
                continue_logger_run(logger, file.read_text())
            elif getattr(rank_zero_only, "rank", 0) == 0:
                logger.experiment  # noqa: B018  (begins the run)
                file.write_text(str(logger.version if isinstance(logger, WandbLogger) else logger.run_id))
    return loggers


@contextmanager
def clean_up_on_failure(trainer: L.Trainer, folder: Path, resumed: bool) -> Iterator[None]:
    """Takes away what a run that fails before its first batch has made in its folder, unless it is a resumed one.

    Ends what would go on into the next job of a multirun: a process has one run of W&B at a time.
    """
    before, begun = list_tree(folder), True
    try:
        yield
    except Exception:
        begun = resumed or trainer.fit_loop.total_batch_idx > 0
        raise
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger) and trainer.is_global_zero:
                logger.experiment.finish()
        if not begun and trainer.is_global_zero:
            remove_new_files(folder, before)


def write_metrics(folder: Path, metrics: dict[str, Any]) -> None:
    """Writes beside and renames, so that a metrics.json is always whole and its presence means done."""
    beside = folder / f".{METRICS_FILE}.part"
    beside.write_text(json.dumps(metrics, indent=2) + "\n")
    os.replace(beside, folder / METRICS_FILE)


def collect_results(
    cfg: DictConfig, trainer: L.Trainer, record: RunRecorder, metrics: dict[str, Tensor], seconds: dict[str, float]
) -> dict[str, Any]:
    """The contents of metrics.json: scores of the final epoch, and where they come from. Epochs count from 1."""
    module, data = trainer.lightning_module, trainer.datamodule  # type: ignore[attr-defined]
    checkpoints = (c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint))
    best = next((c.best_model_path for c in checkpoints if c.monitor and c.best_model_path), None)
    return {
        "name": cfg.name,
        "run": record.digest,
        "overrides": record.overrides,
        "data": data.spec.name if hasattr(data, "spec") else getattr(data, "name", None) or type(data).__name__,
        "seed": cfg.seed,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "epochs": trainer.current_epoch,
        "best_epoch": torch.load(best, map_location="cpu", weights_only=True)["epoch"] + 1 if best else None,
        "steps": trainer.global_step,
        "metrics": {name: float(value) for name, value in sorted(metrics.items())},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "samples_per_second": round(record.samples / record.seconds, 1) if record.seconds else 0.0,
        **_surroundings(trainer.strategy.root_device),
    }


def _surroundings(device: torch.device) -> dict[str, Any]:
    return {
        "device": get_device_name(device),
        "visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),  # None: all of the machine's
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "git_commit": GIT_COMMIT,
    }


def get_device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()}, mps"
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ")[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that does not say
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the project, with "-dirty" behind it if files were changed since; None outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return found.stdout.strip() or None


GIT_COMMIT = _git_commit()  # when the run begins: the checkout may move on before it ends
