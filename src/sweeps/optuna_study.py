"""An Optuna study over the configs of src.train: storage, search space, trials."""

import math
import re
import warnings
from collections.abc import Callable, Sequence
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
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback

from src.core.compat import run_as_job
from src.core.config import resolve_and_validate
from src.core.errors import DivergenceError, UserError, format_metric
from src.core.files import exclusive_lock
from src.core.process import configure_hardware
from src.core.run_folder import make_portable, record_status, write_config
from src.sweeps.runs import explain_no_ranking, format_value, reject_different_config

STUDY_KEYS = "n_trials", "study_name", "storage", "heartbeat", "sampler", "pruner", "search"  # not in conf/train.yaml
COUNTED = TrialState.COMPLETE, TrialState.PRUNED
warnings.filterwarnings("ignore", category=ExperimentalWarning)


def open_storage(place: str | None, heartbeat: int, folder: Path) -> BaseStorage:
    """Open SQLite in the study's folder, a journal if `place` is a file, else the database of a URL.

    A trial whose process is silent for two heartbeats (seconds) is enqueued again, except in a journal, which has no
    heartbeat. Raises UserError for a file that is no journal, and if the database's driver is not installed.
    """
    if place is not None and "://" not in place:
        if (file := Path(place)).exists() and not b'{"op_code"'.startswith(file.open("rb").read(10)):
            raise UserError(f"storage={place}: exists and is no journal of Optuna; name a new file")
        return JournalStorage(JournalFileBackend(place))
    url = place or f"sqlite:///{folder / 'study.db'}"
    settings: Any = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    retry = RetryHeartbeatStaleTrialCallback()
    try:
        return RDBStorage(url, settings, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=retry)
    except ImportError as error:
        raise UserError(f"storage={url}: {error}; install its driver, as pip install psycopg") from error


def open_study(cfg: DictConfig, folder: Path, overrides: Sequence[str] = ()) -> optuna.Study:
    """Begin or continue the study of the config. Raise UserError if it was begun with other settings."""
    if reason := explain_no_ranking(cfg.optimized_metric, bool(OmegaConf.select(cfg, "data.test_every_epoch"))):
        raise UserError(f"{reason}; set optimized_metric=val/acc and data.test_every_epoch=false")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with FileLock(folder / ".study.lock"):  # processes that start together must create the tables once
        study = optuna.create_study(
            storage=open_storage(cfg.storage, cfg.heartbeat, folder),
            study_name=cfg.study_name,
            direction="minimize" if cfg.optimized_mode == "min" else "maximize",
            pruner=instantiate(cfg.pruner),
            load_if_exists=True,
        )
        if "settings" not in study.user_attrs and any(folder.glob("[0-9][0-9][0-9]_*")):
            raise UserError(f"{folder}: holds the trials of another study; type study_name=NAME for a new folder")
        ignored = *STUDY_KEYS[:-1], "output_dir", "threads"
        settings = {key: value for key, value in make_portable(cfg).items() if key not in ignored}
        before = study.user_attrs.get("settings", settings)
        reject_different_config(before, settings, f"the study in {folder}", overrides)
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

    def print_trial(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        words = trial.state.name.lower()
        if trial.state == TrialState.COMPLETE:
            words = f"{format_metric(metric, trial.values[0])}, best {format_metric(metric, study.best_value)}"
        print(f"trial {trial.number}: {words}", flush=True)

    if count < target:
        study.optimize(objective, callbacks=[print_trial, MaxTrialsCallback(target, states=COUNTED)])


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
    is_own = re.compile(rf"[+~]*({'|'.join(STUDY_KEYS)})\b").match
    overrides = [item for item in HydraConfig.get().overrides.task if not is_own(item)]
    config = compose("train", overrides=[*overrides, *settings], return_hydra_config=True)
    with read_write(config):
        config.hydra.mode = RunMode.MULTIRUN  # one run of several
        config.hydra.run.dir = str(folder / name)

    def task(cfg: DictConfig) -> float:
        cfg = resolve_and_validate(cfg)
        cfg.resume = None if first is None else cfg.output_dir
        with exclusive_lock(folder / name), record_status(folder / name):
            configure_hardware(cfg)
            write_config(cfg, folder / name)
            try:
                return train(cfg, PyTorchLightningPruningCallback(trial, cfg.optimized_metric))
            except DivergenceError as error:  # the study learns to avoid such settings
                raise optuna.TrialPruned(str(error)) from error

    print(f"trial {trial.number}: {' '.join(settings)}", flush=True)
    try:
        score = run_as_job(task, config)
    except SystemExit:  # a signal: let another process continue the trial at once
        trial.study.tell(trial, state=TrialState.FAIL)
        RetryHeartbeatStaleTrialCallback()(trial.study, trial.study.trials[trial.number])
        raise
    if not math.isfinite(score):  # Optuna would count it as failed, and never reach its target
        raise optuna.TrialPruned
    return score
