"""Run a function of a config as a Hydra program: parse the command line, check the config, run, report errors."""

import functools
import os
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from src.cli.argparse_main import get_version
from src.cli.help import print_help
from src.core import run_folder
from src.core.compat import parse_hydra_arguments, run_hydra
from src.core.config import CONF, reject_wrong_keys, resolve_and_validate
from src.core.error_messages import describe_error, exit_on_error
from src.core.errors import DivergenceError, UserError, print_error
from src.core.files import exclusive_lock
from src.core.process import configure_hardware, is_first_process, pin_gpu, restore_global_state

CLUSTER_VARIABLES = "SLURM_NTASKS", "SLURM_PROCID", "WORLD_SIZE", "RANK", "LOCAL_RANK"
INTERACTIVE_JOBS = None, "bash", "interactive"  # Slurm job names for which Lightning starts the processes itself


class CheckCommand(Callback):
    """Check the composed config of a run before Hydra writes anything; exit with one line for a mistake."""

    is_new_folder = True  # whether the run folder of this process did not exist before

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.run.dir)
        CheckCommand.is_new_folder = not folder.exists()
        with exit_on_error():  # Hydra turns exceptions of callbacks into warnings
            reject_wrong_keys(config)
            kind, wanted = run_folder.find_kind(folder), "study" if "study_name" in config else "run"
            may_continue = wanted == "study" or config.resume or _count_processes() > 1
            if kind and not (may_continue and kind == wanted):
                fix = f"type another folder, or resume={folder} to continue a run"
                raise UserError(f"hydra.run.dir={folder}: holds a {kind}; {fix}")


def hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Return the program that composes `config_name`, checks the config and calls `task` with it."""
    changes: list[str] = []  # overrides of a resumed run

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        hydra_config, started_at = HydraConfig.get(), time.monotonic()
        folder, is_multirun = Path(hydra_config.runtime.output_dir), hydra_config.mode == RunMode.MULTIRUN
        is_resumed, is_study = bool(config.resume), config_name == "tune"
        with read_write(hydra_config):  # type: ignore[arg-type]
            hydra_config.overrides.task.extend(changes)
        if is_multirun and (folder / run_folder.METRICS_FILE).exists():
            print(f"already finished: {folder.name}", flush=True)
            return None
        try:
            with ExitStack() as stack:
                if not is_study:  # several processes may work on one study, whose trials have folders of their own
                    stack.enter_context(exclusive_lock(folder))
                    stack.enter_context(run_folder.record_status(folder))
                config = run_folder.load_resumed_config(config, changes) if is_resumed else config
                mode, config = config.get("optimized_mode"), resolve_and_validate(config)
                if mode != config.get("optimized_mode") == "min" and is_first_process() and not is_multirun:
                    print(f"{config.optimized_metric}: lower is better, by its name; optimized_mode=max reverses it")
                stack.enter_context(restore_global_state())
                configure_hardware(config)
                if is_multirun:
                    pin_gpu(config)
                    config.resume = str(folder)  # continue if an earlier start of the sweep left a checkpoint
                if is_first_process() and not is_study and not is_resumed:
                    run_folder.write_config(config, folder)
                return task(config)
        except SystemExit as stop:
            if is_first_process() and not is_multirun:  # a sweep prints its own
                path, given = os.path.relpath(folder, hydra_config.runtime.cwd), hydra_config.overrides
                command = f"src.train resume={shlex.quote(path)} {shlex.join(changes)}".rstrip()
                if is_study:
                    command = f"src.tune {shlex.join([*given.task, *given.hydra[:-1]])}"  # without hydra.mode=RUN
                run_folder.print_continue_command(stop.code, f"python -m {command}")
            raise
        except Exception as error:
            line = describe_error(error, OmegaConf.select(config, "data.batch_size"))
            if line is None:
                raise
            if is_multirun:
                raise UserError(line) from error
            is_own = CheckCommand.is_new_folder and is_first_process() and not is_resumed
            if is_own and time.monotonic() - started_at < 60 and not isinstance(error, DivergenceError):
                run_folder.remove_if_untrained(folder)
            sys.exit(print_error(line))

    @functools.wraps(task)
    def main() -> None:
        with exit_on_error():
            if "--version" in sys.argv:
                return print(get_version())
            if {"--help", "-h"} & {*sys.argv}:
                return print_help(config_name, [word for word in sys.argv[1:] if not word.startswith("-")])
            if config_name == "tune":  # several processes are as many workers on the study, not ranks of one run
                for name in CLUSTER_VARIABLES:
                    os.environ.pop(name, None)
            arguments = parse_hydra_arguments(sys.argv[1:])
            changes[:] = _complete_arguments(arguments)
            run_hydra(arguments, job, CONF, config_name)

    return main


def _complete_arguments(arguments: Namespace) -> list[str]:
    """Quote paths, recognise sweeps by their config, and turn resume=RUN into the folder of that run.

    Return the overrides that change the config of a resumed run.
    """
    if re.search(r"[\ud800-\udfff]", "".join(arguments.overrides)):  # Python's surrogates
        raise UserError("a name has letters that this locale cannot encode; set PYTHONUTF8=1")
    overrides = arguments.overrides = [_quote(override) for override in arguments.overrides]
    if any(re.match(r"sweep=(?!null)|hydra\.mode=MULTIRUN", override) for override in overrides):
        arguments.multirun = arguments.cfg is None and arguments.info is None
    changes: list[str] = []
    has_folder = any(override.startswith("hydra.run.dir=") for override in overrides)
    if resumed := [override for override in overrides if override.startswith("resume=")]:
        folder = Path(str(OverridesParser.create().parse_override(resumed[0]).value()))
        changes = [override for override in overrides if not override.startswith((resumed[0], "hydra."))]
        if other := [change for change in changes if not run_folder.RESUME_OVERRIDES.fullmatch(change)]:
            fix = f"leave out {' '.join(other)}, or type init_from={folder} instead, for a new run from its weights"
            raise UserError(f"resume={folder}: continues one run with its own config; {fix}")
        # The others are for the saved config, which need not have the keys of the defaults.
        overrides[:] = [item for item in overrides if item not in changes or re.match(r"(callbacks|logger)=", item)]
        if arguments.multirun:
            raise UserError(f"resume={folder}: continues one run; leave out -m")
        if run_folder.find_kind(folder) != "run" or not (folder / run_folder.CONFIG_FILE).is_file():
            reason = "no run, or one that was stopped while its config was written"
            raise UserError(f"resume={folder}: {reason}; name one below outputs/, or type its first command again")
        if (folder / run_folder.METRICS_FILE).exists() and not changes:
            print(f"{folder} is finished: its metrics are in metrics.json; trainer.max_epochs=… trains it longer")
            sys.exit()
        if not has_folder:  # the other processes of a DDP run have it
            overrides += [resumed[0].replace("resume=", "hydra.run.dir=", 1), "hydra.output_subdir=null"]
    elif _count_processes() > 1 and not (has_folder or arguments.multirun or arguments.cfg):
        raise UserError("several processes need one run folder; set hydra.run.dir=… to the same for each")
    elif not is_first_process():
        overrides.append("hydra.output_subdir=null")  # the first process writes the config
    return changes


def _count_processes() -> int:
    """Return how many processes a cluster or torchrun has started for this run."""
    tasks = os.environ.get("SLURM_NTASKS", "1") if os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE_JOBS else "1"
    return max(int(tasks), int(os.environ.get("WORLD_SIZE", "1")))


def _quote(override: str) -> str:
    """Quote a value that Hydra cannot parse, such as a path with spaces; expand ~."""
    override = re.sub(r"^init_from=(?!\{)", "init_from.path=", override)
    key, _, value = override.partition("=")
    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        if value and value[0] not in "[{'\"":
            return f"{key}={QuotedString(os.path.expanduser(value), Quote.single).with_quotes()}"
    return override
