"""Run a function of a config as a Hydra program: parse the command line, check the config, run, report errors."""

import functools
import os
import re
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from src.cli.argparse_main import VERSION
from src.cli.help import print_help
from src.core import run_folder
from src.core.compat import parse_hydra_arguments, run_hydra
from src.core.config import CONF, reject_wrong_keys, resolve_and_validate
from src.core.error_messages import describe_error, exit_on_error
from src.core.errors import DivergenceError, UserError, print_error
from src.core.files import exclusive_lock
from src.core.process import configure_hardware, is_first_process, pin_gpu, restore_global_state


class CheckCommand(Callback):
    """Check the composed config of a run before Hydra writes anything; exit with one line for a mistake."""

    changes: Sequence[str] = ()  # overrides of the saved config, if the run is resumed
    is_new_folder = True  # whether the run folder did not exist before

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        with exit_on_error():  # Hydra turns exceptions of callbacks into warnings
            reject_wrong_keys(config)
            if config.resume:
                config.hydra.run.dir = config.resume
                config.hydra.overrides.task.extend(self.changes)
            if config.resume or not is_first_process():
                config.hydra.output_subdir = None  # the first process writes the config
            folder, wanted = Path(config.hydra.run.dir), "study" if "study_name" in config else "run"
            CheckCommand.is_new_folder = not folder.exists()
            kind = run_folder.find_kind(folder)
            if config.resume and not (kind == wanted and (folder / run_folder.CONFIG_FILE).is_file()):
                reason = "no run, or one that was stopped while its config was written"
                raise UserError(f"resume={folder}: {reason}; name one below outputs/, or type its first command again")
            may_continue = wanted == "study" or config.resume or not is_first_process()
            if kind and not (may_continue and kind == wanted):
                fix = f"type another folder, or resume={folder} to continue a run"
                raise UserError(f"hydra.run.dir={folder}: holds a {kind}; {fix}")


def hydra_main(config_name: str, task: Callable[[DictConfig], Any]) -> Callable[[], None]:
    """Return the program that composes `config_name`, checks the config and calls `task` with it."""

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        hydra_config, started_at, changes = HydraConfig.get(), time.monotonic(), CheckCommand.changes
        folder, is_multirun = Path(hydra_config.runtime.output_dir), hydra_config.mode == RunMode.MULTIRUN
        is_resumed, is_study = bool(config.resume), config_name == "tune"
        if (folder / run_folder.METRICS_FILE).exists() and not changes:
            return print(f"already finished: {folder.name}", flush=True)
        try:
            with ExitStack() as stack:
                if not is_study:  # several processes may work on one study, whose trials have folders of their own
                    stack.enter_context(exclusive_lock(folder))
                    stack.enter_context(run_folder.record_status(folder))
                config = run_folder.load_resumed_config(config, changes) if is_resumed else config
                config = resolve_and_validate(config)
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
                path = os.path.relpath(folder, hydra_config.runtime.cwd)
                words = sys.argv[1:] if is_study else [f"resume={path}", *changes]
                run_folder.print_continue_command(stop.code, f"python -m src.{config_name} {shlex.join(words)}")
            raise
        except Exception as error:
            line = describe_error(error)
            if line is None:
                raise
            if is_multirun:
                raise UserError(line) from error
            is_early = time.monotonic() - started_at < 60 and not isinstance(error, DivergenceError)
            if is_early and is_first_process() and CheckCommand.is_new_folder:
                run_folder.remove_if_untrained(folder)
            sys.exit(print_error(line))

    @functools.wraps(task)
    def main() -> None:
        with exit_on_error():
            if "--version" in sys.argv:
                return print(f"digitlab {VERSION}")
            if {"--help", "-h"} & {*sys.argv}:
                return print_help(config_name)
            if config_name == "tune":  # several processes are as many workers on the study, not ranks of one run
                for name in "SLURM_NTASKS", "SLURM_PROCID", "WORLD_SIZE", "RANK", "LOCAL_RANK":
                    os.environ.pop(name, None)
            arguments = parse_hydra_arguments(sys.argv[1:])
            CheckCommand.changes = _complete_arguments(arguments)
            run_hydra(arguments, job, CONF, config_name)

    return main


def _complete_arguments(arguments: Namespace) -> list[str]:
    """Quote paths and recognise sweeps by their config; return the overrides of the saved config of a resumed run."""
    overrides = [_quote(override) for override in arguments.overrides]
    if any(re.match(r"sweep=(?!null)|hydra\.mode=MULTIRUN", override) for override in overrides):
        arguments.multirun = arguments.cfg is None and arguments.info is None
    resumed = next((override for override in overrides if override.startswith("resume=")), None)
    changes = [item for item in overrides if resumed and not item.startswith(("resume=", "hydra."))]
    if other := [change for change in changes if not run_folder.RESUME_OVERRIDES.fullmatch(change)]:
        fix = f"leave out {' '.join(other)}, or type init_from=… instead, for a new run from its weights"
        raise UserError(f"{resumed}: continues one run with its own config; {fix}")
    if resumed and arguments.multirun:
        raise UserError(f"{resumed}: continues one run; leave out -m")
    # The saved config need not have the keys of the defaults, to which Hydra would apply the changes.
    arguments.overrides = [item for item in overrides if item not in changes or re.match(r"(callbacks|logger)=", item)]
    process_count = max(int(os.environ.get(name, "1")) for name in ("SLURM_NTASKS", "WORLD_SIZE"))
    has_folder = resumed or any(override.startswith("hydra.run.dir=") for override in overrides)
    if process_count > 1 and not (has_folder or arguments.multirun or arguments.cfg):
        raise UserError("several processes need one run folder; set hydra.run.dir=… to the same for each")
    return changes


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
