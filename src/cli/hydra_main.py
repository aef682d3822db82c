"""Hydra's command line, with users' mistakes told in one line and exit code 2."""

import functools
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence, Set
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from src.core.compat import get_hydra_parser, validate_before_run
from src.core.config import CONF, ROOT_KEYS, find_closest, load_allowed_packages, resolve_config, validate_config
from src.core.error_messages import describe_error, describe_lost_process, describe_unknown_key, list_keys
from src.core.errors import UserError, print_error
from src.core.files import exclusive_lock, list_tree, remove_new_files
from src.core.process import (
    FIRST,
    exit_on_signals,
    exit_with_first_process,
    ignore_closed_stdout,
    is_first_process,
    register_active_run,
    resolve_precision,
    restore_global_state,
)
from src.core.run_folder import (
    CONFIG_FILE,
    is_finished,
    load_resumed_config,
    parse_resume_arguments,
    print_continue_command,
    write_config,
)

STOPPED = 128 + signal.SIGINT, 128 + signal.SIGTERM
FAILED = ".failed"  # in the folder of a sweep that fails fast: no further job begins
SEVERAL = "SLURM_NTASKS", "SLURM_PROCID", "WORLD_SIZE", "RANK", "LOCAL_RANK"
INTERACTIVE = None, "bash", "interactive"  # as Lightning sees it: Slurm has started one process here


def hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """The program that runs a function of a config: parse, check, run, explain."""

    kept: list[set[Path]] = []  # what was in the run folder before

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        mode, folder = HydraConfig.get().mode, Path(HydraConfig.get().runtime.output_dir)
        resumed = config.get("resume")
        try:
            config = resolve_and_validate(
                load_resumed_config(config) if resumed else config, None if not resumed else load_allowed_packages()
            )
            if mode == RunMode.MULTIRUN:
                if is_finished(folder):
                    print(f"finished before: {folder.name}", flush=True)
                    return None
                if Path(HydraConfig.get().sweep.dir, FAILED).exists():
                    print(f"not begun, for another has failed: {folder.name}", flush=True)
                    return None
                config.resume = str(folder)  # from its last checkpoint, if an earlier start of this sweep left one
            if "find_unused" in str(OmegaConf.select(config, "trainer.strategy")):
                os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # each process would warn that it found none
            # Several processes may work on a study; its runs have folders of their own.
            with (
                exclusive_lock(folder) if config_name == "train" else nullcontext(),
                register_active_run(),
                restore_global_state(),
            ):
                resolve_precision(config)
                if not resumed and is_first_process() and (folder / CONFIG_FILE).exists():
                    # With the values that it has now: whoever continues the run looks nothing up.
                    write_config(config, folder)
                return task(config)
        except SystemExit as stop:
            from multiprocessing import parent_process  # here, because --help should not wait for it

            if stop.code in STOPPED and is_first_process() and not parent_process():  # of a sweep that tells itself
                print_continue_command(folder, signal.Signals(stop.code - 128).name)
            raise
        except Exception as error:
            if lost := describe_lost_process(error):
                print(f"error: {lost}", file=sys.stderr)
                sys.exit(1)
            line = describe_error(error, OmegaConf.select(config, "data.batch_size"))
            if line is None:
                raise
            if mode == RunMode.MULTIRUN:
                raise error if isinstance(error, UserError) else UserError(line) from error
            if not resumed and is_first_process():
                with suppress(UserError), exclusive_lock(folder):  # not what another has begun there
                    remove_unstarted_run(folder, kept[-1] if kept else set())
            sys.exit(print_error(line))

    @functools.wraps(task)
    def program() -> None:
        before, arguments = os.environ.get("HYDRA_FULL_ERROR", "0"), sys.argv
        os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints its errors itself, and exits with 1
        try:
            if FIRST in os.environ:  # before it imports what takes seconds
                exit_with_first_process()
            with exit_on_signals(), ignore_closed_stdout():
                if {"--help", "-h"} & {*arguments}:
                    return _help(config_name, arguments[1:])
                if config_name == "tune":  # several processes are as many workers on the study, each for itself
                    for name in SEVERAL:
                        os.environ.pop(name, None)
                sys.argv = [arguments[0], *parse_arguments(arguments[1:], config_name)]
                kept.append(list_tree(_named_folder(sys.argv).resolve()))
                validate_before_run(_check_added)
                hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(job)()
        except Exception as error:
            line = describe_error(error)
            if line is None or before == "1":
                raise
            sys.exit(print_error(line))
        finally:
            os.environ["HYDRA_FULL_ERROR"], sys.argv = before, arguments

    return program


def _help(config_name: str, arguments: list[str]) -> None:
    from src.cli.help import print_help  # here, because a run needs none of it

    words = [argument for argument in arguments if not argument.startswith("-")]
    print_help(config_name, [word for word in words if "=" not in word], [word for word in words if "=" in word])


def parse_arguments(arguments: list[str], config_name: str) -> list[str]:
    """Arguments as a shell completes them, made such that Hydra understands them."""
    arguments = _flags_first([_quoted(argument) for argument in arguments], config_name)
    resumed = [argument for argument in arguments if argument.startswith("resume=")]
    if len(resumed) > 1:
        raise UserError(f"{' '.join(resumed)}: name one run; each is continued by a command of its own")
    if resumed:
        return parse_resume_arguments(arguments, resumed[0])
    # Whoever starts the processes himself has to name the folder: the default has the time in it.
    tasks = int(os.environ.get("SLURM_NTASKS", 1)) if os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE else 1
    several = max(tasks, int(os.environ.get("WORLD_SIZE", 1))) > 1
    folder = _named_folder(arguments)
    if (folder / CONFIG_FILE).exists() and not several and "LOCAL_RANK" not in os.environ:
        raise UserError(f"{folder} holds a run; continue it with resume={folder}, or name another folder")
    named = any(argument.startswith(("hydra.run.dir=", "-m", "--multirun", "--cfg")) for argument in arguments)
    if several and not named:
        raise UserError("several processes write into one run folder; set hydra.run.dir=… to the same for each")
    return arguments if is_first_process() else [*arguments, "hydra.output_subdir=null"]  # the first writes the config


def _flags_first(arguments: list[str], config_name: str) -> list[str]:
    """Hydra takes no overrides on both sides of a flag. Raises UserError for a flag that it has not."""
    parser = get_hydra_parser()
    parser.error = _refuse  # type: ignore[method-assign, assignment]
    found, others = parser.parse_known_args(arguments)
    if unknown := next((other for other in others if other.startswith("-")), None):
        key, given, value = unknown.lstrip("-").partition("=")
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            known = list_keys(hydra.compose(config_name))
        meant = describe_unknown_key(key, known, given + value).partition("; ")[2]
        raise UserError(f"{unknown}: there is no such flag, and keys have no dashes; {meant}")
    if not others:
        return arguments
    overrides = {*found.overrides, *others}
    return sorted(arguments, key=overrides.__contains__)


def _refuse(message: str) -> NoReturn:
    raise UserError(f"{message}; python -m src.train --hydra-help shows the flags")


def _named_folder(arguments: list[str]) -> Path:
    """The run folder that a command names; one that is not there if it names none."""
    values = [value for key, _, value in (argument.partition("=") for argument in arguments) if key == "hydra.run.dir"]
    return Path(values[-1].strip("'\"") if values else "no folder is named")


def _quoted(argument: str) -> str:
    """Quotes a value that is a path with characters which Hydra's grammar gives a meaning, as optimizer.lr=0.1."""
    key, _, value = argument.partition("=")
    special = re.search(r"[^\w./~+:%@-]", value)
    if not re.fullmatch(r"[\w.+@/]+", key) or not special or not Path(value).expanduser().exists():
        return argument
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def resolve_and_validate(config: DictConfig, allowed: list[str] | None = None) -> DictConfig:
    """The config without interpolations, once it holds to the rules. Raises UserError."""
    config = resolve_config(config)
    validate_config(config, allowed)
    return config


def _check_added(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Refuses +key=value where a known key was meant: Hydra recommends that form for every typing mistake."""
    added = {override.key_or_group for override in overrides if override.is_add()}
    if not added:
        return
    below = tuple(f"{key}." for key in added)
    known = [*ROOT_KEYS, *(key for key in list_keys(config) if key not in added and not key.startswith(below))]
    for key in sorted(added - set(known)):
        parent, _, _ = key.rpartition(".")
        siblings = [name for name in known if name.rpartition(".")[0] == parent]
        if not parent or find_closest(key, siblings, cutoff=0.9):
            raise UserError(describe_unknown_key(key, known))


def remove_unstarted_run(folder: Path, before: Set[Path] = frozenset()) -> None:
    """Removes what never began has left in its folder: Hydra's config and files without content, and nothing else.

    Nothing that was there `before`, the folder itself included.
    """
    folder = folder.resolve()
    files = [file for file in list_tree(folder) - before if file.is_file()]
    # TensorBoard's file has something to show once there is a hparams.yaml.
    nothing = re.compile(r"(\.hydra|\.tune)/\w+\.yaml|multirun\.yaml|events\.out\.tfevents\.[^/]*")
    if all(
        nothing.fullmatch(file.relative_to(folder).as_posix()) or (file.suffix == ".log" and not file.stat().st_size)
        for file in files
    ):
        remove_new_files(folder, before)
        if folder.parent.parent == Path("outputs").resolve():
            with suppress(OSError):
                folder.parent.rmdir()
