"""An Optuna study over the configs of src.train: its storage, its search space, its trials, who does them."""

import time
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
from optuna.storages import BaseStorage, RDBStorage, RetryHeartbeatStaleTrialCallback, fail_stale_trials
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback

from src.cli.hydra_main import resolve_and_validate
from src.core.compat import journal, run_as_job
from src.core.errors import DivergenceError, UserError
from src.core.files import exclusive_lock
from src.core.process import resolve_precision
from src.core.run_folder import write_config
from src.sweeps.callback import ERROR_FILE, record_failure
from src.sweeps.runs import PRUNED, explain_no_ranking, flatten_config, reject_different_config, text

# The keys of conf/tune.yaml that conf/train.yaml lacks.
OWN = "n_trials", "study_name", "storage", "heartbeat", "sampler", "pruner", "search"
COUNTED = TrialState.COMPLETE, TrialState.PRUNED
ALIVE = *COUNTED, TrialState.RUNNING, TrialState.WAITING
# A trial whose process was killed no longer beats; whoever notices enqueues it once more.
with warnings.catch_warnings(action="ignore"):
    RETRY = RetryHeartbeatStaleTrialCallback()


class Surplus(Exception):
    """A trial that others, which began at the same moment, have made one too many."""


def open_storage(place: str | None, heartbeat: int, folder: Path) -> BaseStorage:
    """SQLite in the study's folder, a journal if `place` is a file, else what SQLAlchemy makes of the URL.

    Raises UserError where it cannot be reached.
    """
    if place is not None and "://" not in place:
        return journal(Path(place), heartbeat, RETRY)
    url = place or f"sqlite:///{folder / 'study.db'}"
    patience = {"connect_args": {"timeout": 60}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    try:
        return RDBStorage(url, patience, heartbeat_interval=heartbeat, heartbeat_stale_trial_callback=RETRY)
    except ImportError as error:
        raise UserError(f"storage: {error} (of PostgreSQL: pip install psycopg, postgresql+psycopg://…)") from error
    except Exception as error:  # each database has its own
        raise UserError(f"storage: {str(error).splitlines()[0]}") from error


def open_study(cfg: DictConfig, folder: Path) -> optuna.Study:
    """The study of the config, begun or continued. Raises UserError if it was begun with other settings."""
    if why_not := explain_no_ranking(cfg):
        raise UserError(f"{why_not}; set optimized_metric=val/acc and data.test_every_epoch=false")
    warnings.filterwarnings("ignore", category=ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # it answers a mistake with a traceback; see tell
    with FileLock(folder / ".study.lock"):  # of processes that begin together one makes the tables
        storage = open_storage(cfg.storage, cfg.heartbeat, folder)
        study = optuna.create_study(
            storage=storage,
            study_name=cfg.study_name,
            direction="minimize" if cfg.optimized_mode == "min" else "maximize",
            pruner=instantiate(cfg.pruner),
            load_if_exists=True,
        )
        settings = {key: str(leaf) for key, leaf in flatten_config(cfg).items() if key.split(".")[0] not in OWN[:-1]}
        fix = "continue it with the same settings, or begin another with study_name=NAME"
        reject_different_config(study.user_attrs.get("settings", settings), settings, f"the study in {folder}", fix)
        study.set_user_attr("settings", settings)
        # With one seed for every start, a continued study, or a second process, would draw its first trials once more.
        starts = study.user_attrs.get("starts", 0)
        study.set_user_attr("starts", starts + 1)
    study.sampler = instantiate(cfg.sampler, seed=cfg.seed + starts)
    return study


def count(study: optuna.Study, *states: TrialState) -> int:
    return len(study.get_trials(deepcopy=False, states=states))


def optimize(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], float],
    target: int,
    folder: Path,
    ended: Callable[[], None],
) -> None:
    """Runs trials until `target` of them are counted, however many processes do: not one more.

    `ended` is called after each. Where the others' trials are enough, waits for their end: one may be killed or fail.
    """
    claim = FileLock(folder / ".study.lock")  # SQLite gives two that ask at once the same trial

    def claimed(trial: optuna.Trial) -> float:
        claim.release()
        # For a disk whose locks do not hold: storages number trials in one order for all; the first `target` go on.
        if sum(one.number < trial.number for one in study.get_trials(deepcopy=False, states=ALIVE)) >= target:
            raise Surplus
        return objective(trial)

    while count(study, *COUNTED) < target:
        with claim:
            fail_stale_trials(study)  # which fails a trial, then enqueues it: in between another would begin a new one
            if count(study, *COUNTED, TrialState.RUNNING) < target:
                study.optimize(claimed, n_trials=1, callbacks=[lambda *_: ended()], catch=(Surplus,))
                continue
        time.sleep(1)


def suggest(trial: optuna.Trial, space: Any, key: str = "") -> dict[str, Any]:
    """A value for each key of a search space of plain values. Raises UserError for one that Optuna refuses."""
    if not isinstance(space, dict):
        raise UserError(f"search{'.' * bool(key)}{key}={space}: must be keys with their ranges, as in conf/search/")
    if "suggest" not in space:
        parts = [suggest(trial, child, f"{key}.{name}".removeprefix(".")) for name, child in space.items()]
        return {name: value for part in parts for name, value in part.items()}
    kind, further = space["suggest"], {name: x for name, x in space.items() if name != "suggest"}
    if kind not in ("float", "int", "categorical"):
        raise UserError(f"search.{key}.suggest={kind}: must be float, int or categorical")
    try:
        value = getattr(trial, f"suggest_{kind}")(key, **further)
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"search.{key}: {error}") from error
    return {key: float(text(value)) if kind == "float" else value}  # 0.15, where steps of 0.05 add up to more


def run_trial(trial: optuna.Trial, train: Callable[..., Any], search: DictConfig, study_folder: Path) -> float:
    """Trains as src.train would with the suggested values, in a folder of its own.

    Raises optuna.TrialPruned where the study stops the trial early, or the training diverges.
    """
    values = suggest(trial, OmegaConf.to_container(search))
    shared = [
        one for one in HydraConfig.get().overrides.task if one.lstrip("+~").split("=")[0].split(".")[0] not in OWN
    ]
    first = RETRY.retried_trial_number(trial.study.trials[trial.number])  # of a trial that was cut short; it goes on
    number = trial.number if first is None else first
    name = "_".join([f"{number:03d}", *(f"{key}={text(value)}" for key, value in values.items())])
    config = compose(
        "train", overrides=[*shared, *(f"{key}={value}" for key, value in values.items())], return_hydra_config=True
    )
    print(f"trial {trial.number}: {' '.join(f'{key}={text(value)}' for key, value in values.items())}", flush=True)
    with read_write(config):
        config.hydra.mode = RunMode.MULTIRUN  # one run of several
        config.hydra.run.dir = str(study_folder / name.replace("/", "-"))

    def task(cfg: DictConfig) -> Any:
        try:
            cfg = resolve_and_validate(cfg)
            if first is not None:
                cfg.resume = cfg.output_dir
            with exclusive_lock(Path(cfg.output_dir)):
                resolve_precision(cfg)
                write_config(cfg, Path(cfg.output_dir))
                return train(cfg, PyTorchLightningPruningCallback(trial, cfg.optimized_metric))
        except SystemExit:  # a signal: not to be waited for
            trial.study.tell(trial, state=TrialState.FAIL)
            RETRY(trial.study, trial.study.trials[trial.number])
            raise
        except Exception as error:
            return error

    result = run_as_job(task, config)
    error_file = Path(config.hydra.run.dir) / ERROR_FILE
    if isinstance(result, DivergenceError):  # not a mistake to stop for: the study learns to stay away
        error_file.write_text(f"{PRUNED}: {result}\n")
        raise optuna.TrialPruned from result
    if isinstance(result, optuna.TrialPruned):
        error_file.write_text(f"{PRUNED}: worse than earlier trials at this epoch\n")
        raise result
    if isinstance(result, Exception):
        record_failure(error_file.parent, result)
        raise result
    return result
