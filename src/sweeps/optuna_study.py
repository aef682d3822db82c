"""An Optuna study over the configs of src.train: storage, search space, trials."""

import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf, read_write
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback

from src.core.compat import run_as_job
from src.core.config import resolve_and_validate
from src.core.errors import DivergenceError, UserError, format_metric
from src.core.files import exclusive_lock
from src.core.process import configure_hardware
from src.core.run_folder import find_kind, record_status, write_config
from src.sweeps.runs import format_value

# Overrides of conf/tune.yaml that are not for the trials, whose config is conf/train.yaml.
STUDY_OVERRIDE = re.compile(r"[+~]*(n_trials|study_name|storage|heartbeat|sampler|pruner|search)\b")
COUNTED = TrialState.COMPLETE, TrialState.PRUNED
warnings.filterwarnings("ignore", category=ExperimentalWarning)


def open_study(cfg: DictConfig, folder: Path) -> optuna.Study:
    """Begin or continue the study of the config, in SQLite in its folder or in the database of a URL.

    A trial whose process is silent for two heartbeats (seconds) is enqueued again. Raises UserError if the study was
    begun with another metric or search space.
    """
    if cfg.optimized_metric is None or OmegaConf.select(cfg, "data.test_every_epoch"):
        fix = "set optimized_metric=val/acc and data.test_every_epoch=false"
        raise UserError(f"optimized_metric={cfg.optimized_metric}: a study needs validation images; {fix}")
    url = cfg.storage or f"sqlite:///{folder / 'study.db'}?timeout=60"
    retry = RetryHeartbeatStaleTrialCallback()
    options = {"heartbeat_interval": cfg.heartbeat, "heartbeat_stale_trial_callback": retry}
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with FileLock(folder / ".study.lock"):  # processes that start together must create the tables once
        study = optuna.create_study(
            storage=RDBStorage(url, {"pool_pre_ping": True}, **options),
            study_name=cfg.study_name,
            direction="minimize" if cfg.optimized_mode == "min" else "maximize",
            pruner=instantiate(cfg.pruner),
            load_if_exists=True,
        )
        settings = {"optimized_metric": cfg.optimized_metric, "search": OmegaConf.to_container(cfg.search)}
        if (before := study.user_attrs.get("settings", settings)) != settings:
            raise UserError(f"{folder}: its study was begun with {before}; type that, or study_name=NAME for a new one")
        study.set_user_attr("settings", settings)
        # The same sampler seed in every process would suggest the same trials again.
        starts = study.user_attrs.get("starts", 0)
        study.set_user_attr("starts", starts + 1)
    seed = cfg.sampler.get("seed", cfg.seed)
    study.sampler = instantiate(cfg.sampler, seed=None if seed is None else seed + starts)
    return study


def optimize(study: optuna.Study, objective: Callable[[optuna.Trial], float], target: int) -> None:
    """Run trials until `target` of them are complete or pruned. Each further process may run one more."""
    metric, count = study.user_attrs["settings"]["optimized_metric"], len(study.get_trials(states=COUNTED))
    print(f"{count} of {target} trials are done; {study.direction.name.lower()} {metric}")
    if count < target:
        study.optimize(objective, callbacks=[MaxTrialsCallback(target, states=COUNTED)])


def suggest(trial: optuna.Trial, space: Any, key: str = "") -> list[str]:
    """Suggest a value for each key of a search space, as an override. Raise UserError for a range that Optuna refuses.

    Choices are strings for Optuna, because it stores no lists.
    """
    if isinstance(space, dict) and "suggest" not in space:
        parts = [suggest(trial, child, f"{key}.{name}".removeprefix(".")) for name, child in space.items()]
        return [override for part in parts for override in part]
    try:
        arguments = {name: value for name, value in space.items() if name != "suggest"}
        if "choices" in arguments:
            arguments["choices"] = [format_value(choice) for choice in arguments["choices"]]
        value = getattr(trial, f"suggest_{space['suggest']}")(key, **arguments)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        fix = "type a range as in conf/search/, with suggest: float, int or categorical"
        raise UserError(f"search.{key}={space}: {error}; {fix}") from error
    return [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value}"]  # 0.15, not 0.15000000000000002


def run_trial(trial: optuna.Trial, train: Callable[..., Any], search: DictConfig, folder: Path) -> float:
    """Train as src.train would with the suggested values, in a folder of its own.

    A trial that was interrupted before continues in its folder. Raises optuna.TrialPruned if the study stops the trial
    early, the training diverges or the score is not finite.
    """
    first = RetryHeartbeatStaleTrialCallback.retried_trial_number(trial.study.trials[trial.number])
    settings = suggest(trial, OmegaConf.to_container(search))
    name = "_".join([f"{trial.number if first is None else first:03d}", *settings]).replace("/", "-")[:200]
    overrides = [item for item in HydraConfig.get().overrides.task if not STUDY_OVERRIDE.match(item)]
    config = compose("train", overrides=[*overrides, *settings], return_hydra_config=True)
    with read_write(config):
        config.hydra.mode = RunMode.MULTIRUN  # one run of several
        config.hydra.run.dir = str(folder / name)

    def task(cfg: DictConfig) -> float:
        cfg = resolve_and_validate(cfg)
        cfg.resume = None if first is None else cfg.output_dir
        if first is None and find_kind(folder / name):
            raise UserError(f"{folder / name}: holds the trial of another study; type study_name=NAME for a new folder")
        with exclusive_lock(folder / name), record_status(folder / name):
            configure_hardware(cfg)
            write_config(cfg, folder / name)
            try:
                return train(cfg, PyTorchLightningPruningCallback(trial, cfg.optimized_metric))
            except DivergenceError as error:  # the study learns to avoid such settings
                raise optuna.TrialPruned(str(error)) from error

    print(f"trial {trial.number}: {' '.join(settings)}", flush=True)
    score = run_as_job(task, config)
    if not math.isfinite(score):  # Optuna would count it as failed, and never reach its target
        raise optuna.TrialPruned
    print(f"trial {trial.number}: {format_metric(config.optimized_metric, score)}", flush=True)
    return score
