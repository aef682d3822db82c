"""An Optuna study over the configs of src.train: its storage, its search space, its trials."""

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
from omegaconf import DictConfig, read_write
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback

from src.command.entry import checked
from src.command.internals import run_as_job
from src.errors import Diverged, UserError
from src.sweeps.callback import ERROR_FILE, record_failure
from src.sweeps.jobs import PRUNED, flat, refuse_other, text, unfit_to_choose_by

# The keys of conf/tune.yaml that conf/train.yaml lacks.
OWN = "trials", "study", "sampler", "pruner", "search"
COUNTED = TrialState.COMPLETE, TrialState.PRUNED


def open_study(cfg: DictConfig, folder: Path) -> optuna.Study:
    """The study in `folder`/study.db, begun or continued. Raises UserError if it was begun with other settings."""
    if why_not := unfit_to_choose_by(cfg):
        raise UserError(f"{why_not}; set optimized_metric=val/acc and data.val_on_test=false")
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it answers a mistake with a traceback; see tell
    # A trial whose process was killed no longer beats; the study takes it up again later.
    retry = RetryHeartbeatStaleTrialCallback()
    with FileLock(folder / ".study.lock"):  # of processes that begin together one makes the tables
        storage = RDBStorage(
            f"sqlite:///{folder / 'study.db'}", heartbeat_interval=30, heartbeat_stale_trial_callback=retry
        )
        study = optuna.create_study(
            storage=storage,
            study_name=cfg.study,
            direction="minimize" if cfg.optimized_mode == "min" else "maximize",
            pruner=instantiate(cfg.pruner),
            load_if_exists=True,
        )
    settings = {key: str(leaf) for key, leaf in flat(cfg).items() if key.split(".")[0] not in OWN[:-1]}
    fix = "continue it with the same settings, or begin another with study=NAME"
    refuse_other(study.user_attrs.get("settings", settings), settings, f"the study in {folder}", fix)
    study.set_user_attr("settings", settings)
    # With one seed for every start, a continued study would draw its first trials once more.
    study.sampler = instantiate(cfg.sampler, seed=cfg.seed + len(study.trials))
    return study


def suggest(trial: optuna.Trial, node: DictConfig, prefix: str = "") -> dict[str, Any]:
    """A value for each key of the search space. Raises UserError for a range that Optuna refuses."""
    values: dict[str, Any] = {}
    for name, child in node.items():
        key = f"{prefix}{name!s}"
        if "suggest" not in child:
            values |= suggest(trial, child, f"{key}.")
            continue
        space = instantiate(child, _convert_="all")
        kind = space.pop("suggest")
        if kind not in ("float", "int", "categorical"):
            raise UserError(f"search.{key}.suggest={kind}: must be float, int or categorical")
        try:
            value = getattr(trial, f"suggest_{kind}")(key, **space)
            values[key] = float(text(value)) if kind == "float" else value  # 0.15, where steps of 0.05 add up to more
        except (TypeError, ValueError) as error:
            raise UserError(f"search.{key}: {error}") from error
    return values


def run_trial(trial: optuna.Trial, train: Callable[..., Any], search: DictConfig, study_folder: Path) -> float:
    """Trains as src.train would with the suggested values, in a folder of its own.

    Raises optuna.TrialPruned where the study stops the trial early, or the training diverges.
    """
    values = suggest(trial, search)
    shared = [
        one for one in HydraConfig.get().overrides.task if one.lstrip("+~").split("=")[0].split(".")[0] not in OWN
    ]
    name = "_".join([f"{trial.number:03d}", *(f"{key}={text(value)}" for key, value in values.items())])
    config = compose(
        "train", overrides=[*shared, *(f"{key}={value}" for key, value in values.items())], return_hydra_config=True
    )
    print(f"trial {trial.number}: {' '.join(f'{key}={text(value)}' for key, value in values.items())}", flush=True)
    with read_write(config):
        config.hydra.mode = RunMode.MULTIRUN  # one run of several
        config.hydra.run.dir = str(study_folder / name.replace("/", "-"))

    def task(cfg: DictConfig) -> Any:
        try:
            cfg = checked(cfg)
            return train(cfg, PyTorchLightningPruningCallback(trial, cfg.optimized_metric))
        except Exception as error:
            return error

    result = run_as_job(task, config)
    error_file = Path(config.hydra.run.dir) / ERROR_FILE
    if isinstance(result, Diverged):  # not a mistake to stop for: the study learns to stay away
        error_file.write_text(f"{PRUNED}: {result}\n")
        raise optuna.TrialPruned from result
    if isinstance(result, optuna.TrialPruned):
        error_file.write_text(f"{PRUNED}: worse than earlier trials at this epoch\n")
        raise result
    if isinstance(result, Exception):
        record_failure(error_file.parent, result)
        raise result
    return result
