"""The project's own keys: which values they allow, and which key a mistyped one meant."""

import ast
import math
import re
from collections.abc import Callable, Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from src.errors import UserError

CONF = Path(__file__).parents[1] / "conf"


class Rule(NamedTuple):
    allows: Callable[[Any], bool]
    words: str


def whole(low: int, high: float = math.inf) -> Rule:
    words = f"a whole number of {low} or more" if high == math.inf else f"a whole number from {low} to {high}"
    return Rule(lambda value: type(value) is int and low <= value <= high, words)


def real(words: str, within: Callable[[float], bool]) -> Rule:
    return Rule(lambda value: type(value) in (int, float) and math.isfinite(value) and within(value), words)


def choice(*options: Any) -> Rule:
    return Rule(lambda value: value in options, "one of " + ", ".join(map(str, options)))


def either(*rules: Rule) -> Rule:
    return Rule(lambda value: any(rule.allows(value) for rule in rules), ", or ".join(r.words for r in rules))


null = Rule(lambda value: value is None, "null")
flag = Rule(lambda value: type(value) is bool, "true or false")
text = Rule(lambda value: type(value) is str and value != "", "a text")
at_least_0 = real("a number of 0 or more", lambda x: x >= 0)
batches = either(whole(0), real("a fraction from 0 to 1", lambda x: 0 <= x <= 1), null)


def _counts(value: Any) -> bool:
    return OmegaConf.is_list(value) and len(value) > 0 and all(type(n) is int and n > 0 for n in value)


# A key that a composed config lacks is not checked: each model, data set or optimizer brings its own.
RULES: dict[str, Rule] = {
    "name": text,
    "seed": whole(0, 2**32 - 1),
    "test": flag,
    "optimized_metric": either(text, null),
    "resume": either(text, null),
    "data.dataset": choice("mnist", "digits", "auto"),
    "data.root": text,
    "data.batch_size": either(whole(1), null),
    "data.eval_batch_size": whole(1),
    "data.val_size": either(whole(0), null),
    "data.val_on_test": flag,
    "data.split_seed": either(whole(0, 2**32 - 1), null),
    "data.augment.degrees": at_least_0,
    "data.augment.translate": at_least_0,
    "data.augment.scale": real("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1),
    "data.augment.shear": at_least_0,
    "data.augment.elastic": at_least_0,
    "data.augment.interpolation": choice("bilinear", "bicubic"),
    "data.augment.decay": real("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "data.reinforce.teacher.files": Rule(
        lambda value: OmegaConf.is_list(value) and len(value) > 0 and all(map(text.allows, value)), "a list of files"
    ),
    "data.reinforce.folder": text,
    "data.reinforce.seed": whole(0, 2**32 - 1),
    "model.channels": Rule(_counts, "a list of whole numbers of 1 or more"),
    "model.stages": Rule(
        lambda value: OmegaConf.is_list(value) and all(map(_counts, value)),
        "lists of whole numbers of 1 or more, in a list",
    ),
    "model.dropout": real("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1),
    "model.blur": real("a number from 0 to 0.25", lambda x: 0 <= x <= 0.25),
    "module.label_smoothing": real("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1),
    "module.temperature": real("a number above 0", lambda x: x > 0),
    "module.teaching": real("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "optimizer.lr": real("a number above 0", lambda x: x > 0),
    "optimizer.momentum": real("a number from 0 up to, but not including, 1", lambda x: 0 <= x < 1),
    "optimizer.weight_decay": at_least_0,
    "optimizer.nesterov": flag,
    "optimizer.others": at_least_0,
    "scheduler.pct_start": real("a number from 0 to 1", lambda x: 0 <= x <= 1),
    "scheduler.div_factor": real("a number above 0", lambda x: x > 0),
    "scheduler.final_div_factor": real("a number above 0", lambda x: x > 0),
    "trials": whole(1),
    "study": text,
    "trainer.max_epochs": either(whole(1), Rule(lambda value: value == -1, "-1 for no limit")),
    "trainer.max_steps": either(whole(1), Rule(lambda value: value == -1, "-1 for no limit")),
    "trainer.num_nodes": whole(1),
    "trainer.limit_train_batches": batches,
    "trainer.limit_val_batches": batches,
    "trainer.limit_test_batches": batches,
    "trainer.gradient_clip_val": either(at_least_0, null),
    "trainer.log_every_n_steps": whole(1),
    "trainer.accumulate_grad_batches": whole(1),
    "trainer.check_val_every_n_epoch": either(whole(1), null),
}


def check(config: DictConfig) -> None:
    """Raises UserError for the first key without a value, or with one that it does not allow."""
    for key, value in nodes(config):
        if value._is_missing():
            raise UserError(f"{key} has no value; set {key}=…")
    for target in targets(config):
        if not _offered(target):
            raise UserError(f"_target_={target}: not a class that this project or its libraries offer to configs")
    for key, rule in RULES.items():
        parent, _, leaf = key.rpartition(".")
        node = OmegaConf.select(config, parent) if parent else config
        if isinstance(node, DictConfig) and leaf in node and not rule.allows(node[leaf]):
            raise UserError(f"{key}={node[leaf]}: must be {rule.words}")


# What a config may name. Classes alone, at the places they are documented at: a longer path would lead on through
# the modules that a module imports, to os.system.
LIBRARIES = re.compile(
    r"torch\.(optim|optim\.lr_scheduler|nn)\.[A-Z]\w*"
    r"|lightning\.Trainer"
    r"|optuna\.(samplers|pruners)\.[A-Z]\w*"
    r"|lightning\.pytorch\.(callbacks|loggers|profilers|strategies|plugins|plugins\.environments)\.[A-Z]\w*"
)
FUNCTIONS = {"src.callbacks.console.progress"}


def _offered(target: str) -> bool:
    """Whether a config may have it built. Nothing is imported to find out."""
    if LIBRARIES.fullmatch(target) or target in FUNCTIONS:
        return True
    module, _, name = target.rpartition(".")
    if not re.fullmatch(r"src(\.[a-z_]\w*)+", module):
        return False
    file = CONF.parent.joinpath(*module.split(".")).with_suffix(".py")
    statements = ast.parse(file.read_text()).body if file.is_file() else []
    return any(isinstance(statement, ast.ClassDef) and statement.name == name for statement in statements)


def targets(container: DictConfig | ListConfig, above: tuple[int, ...] = ()) -> Iterator[str]:
    """Every _target_ in a config, also in lists and behind interpolations."""
    keys: Iterable[Any] = container if isinstance(container, DictConfig) else range(len(container))
    for key in keys:
        try:
            value = container[key]
        except OmegaConfBaseException:  # what cannot be resolved cannot be built either
            continue
        if isinstance(value, dict | list):  # what a resolver has made
            value = OmegaConf.create(value)
        if key == "_target_":
            yield str(value)
        elif OmegaConf.is_config(value) and not value._is_none() and id(value) not in above:
            yield from targets(value, (*above, id(value)))


def nodes(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, Node]]:
    """Every dotted key of a config with its node, inner nodes included; nothing is resolved."""
    for name in config:
        child = config._get_node(name)
        assert isinstance(child, Node)
        yield f"{prefix}{name!s}", child
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from nodes(child, f"{prefix}{name!s}.")


def nearest(key: str, known: list[str], cutoff: float = 0.6) -> str | None:
    """The known key that `key` most likely meant; a bare last part, as in max_epochs, counts as well."""

    def likeness(candidate: str) -> float:
        last = candidate.rpartition(".")[2]
        whole_key = SequenceMatcher(None, key, candidate).ratio()
        # A little less for the last part alone, so that the full key wins where both fit.
        return max(whole_key, 0.95 * SequenceMatcher(None, key.rpartition(".")[2], last).ratio())

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= cutoff else None
