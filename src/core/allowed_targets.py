"""The allow-list of the classes and functions that `_target_` in a config may name."""

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from src.core.errors import UserError

CONFIG = Path(__file__).parents[2] / "conf/train.yaml"
# Only classes at their documented places: a longer path would reach os.system through a module that imports os.
ALLOWED_TARGETS = re.compile(
    r"torch\.(optim|optim\.lr_scheduler|nn)\.[A-Z]\w*"
    r"|lightning\.Trainer"
    r"|optuna\.(samplers|pruners)\.[A-Z]\w*"
    r"|lightning\.pytorch\.(callbacks|loggers|profilers|strategies|plugins|plugins\.environments)\.[A-Z]\w*"
    r"|torchvision\.(models\.[A-Za-z]|ops\.[A-Z])\w*"
    r"|torchmetrics\.(\w+\.)?[A-Z]\w*"
)
OWN_MODULES = rf"{__package__.partition('.')[0]}(?!\.(cli|core|sweeps|benchmark)\b)(\.[a-z]\w*){{2,}}"


def load_target(target: str) -> Any:
    """Import and return the class or function that a config names. Raise UserError for one that it may not name.

    Only conf/train.yaml allows further packages, because evaluate, predict and resume read other configs as well.
    """
    module, _, name = target.rpartition(".")
    further = [rf"{re.escape(package)}(\..*)?" for package in OmegaConf.load(CONFIG).allowed_packages]
    own_modules = re.compile("|".join([OWN_MODULES, *further]))
    is_library = ALLOWED_TARGETS.fullmatch(target)
    if is_library or own_modules.fullmatch(module):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise UserError(f"_target_={target}: {error}") from error
        origin = str(getattr(found, "__module__", ""))  # not the module that merely imports it, as os.system
        if is_library or (own_modules.fullmatch(origin) and not name.startswith("_")):
            return found
    raise UserError(
        f"_target_={target}: configs may not name it; add its package to allowed_packages in the file conf/train.yaml"
    )


@cache
def get_parameters(target: str) -> dict[str, inspect.Parameter]:
    """Return the parameters of an allowed class or function by name, with evaluated annotations."""
    found = load_target(target)
    try:
        signature = inspect.signature(found, eval_str=True)
    except NameError:  # its annotations need names that its module does not import
        signature = inspect.signature(found)
    return dict(signature.parameters)
