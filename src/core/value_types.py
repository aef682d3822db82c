"""Annotations for what a config sets; src.core.config checks every value against them."""

import types
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin


class Constraint(NamedTuple):
    """A description for messages and the predicate that a value has to satisfy."""

    description: str
    is_satisfied_by: Callable[[Any], bool]


FLOAT32_MAX = 3.4028234663852886e38  # a larger number ends in an error of PyTorch


def _float(description: str, is_in_range: Callable[[float], bool]) -> Constraint:
    def is_satisfied_by(x: Any) -> bool:
        return type(x) in (int, float) and abs(x) <= FLOAT32_MAX and is_in_range(x)

    return Constraint(description, is_satisfied_by)


NonNegativeInt = Annotated[int, Constraint("int ≥ 0", lambda n: type(n) is int and n >= 0)]
PositiveInt = Annotated[int, Constraint("int ≥ 1", lambda n: type(n) is int and n >= 1)]
Seed = Annotated[int, Constraint("0 ≤ int < 4294967296", lambda n: type(n) is int and 0 <= n < 2**32)]
PositiveFloat = Annotated[float, _float("float > 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, _float("float ≥ 0", lambda x: x >= 0)]
UnitInterval = Annotated[float, _float("0 ≤ float ≤ 1", lambda x: 0 <= x <= 1)]
PositiveFraction = Annotated[float, _float("0 < float ≤ 1", lambda x: 0 < x <= 1)]
Probability = Annotated[float, _float("0 ≤ float < 1", lambda x: 0 <= x < 1)]
BlurFraction = Annotated[float, _float("0 ≤ float ≤ 0.25", lambda x: 0 <= x <= 0.25)]
NonEmptyStr = Annotated[str, Constraint("non-empty string", lambda x: type(x) is str and x != "")]
StudyName = Annotated[str, Constraint("string without ? or #", lambda x: type(x) is str and x and not {*x} & {*"?#"})]

# Keys of conf/train.yaml and conf/tune.yaml that are no class's arguments.
ROOT_KEYS: dict[str, Any] = {
    "name": NonEmptyStr,
    "seed": Seed,
    "threads": PositiveInt | None,
    "test_weights": Literal["last", "best"] | bool,  # true: last
    "optimized_metric": NonEmptyStr | None,
    "optimized_mode": Literal["max", "min"] | None,
    "allowed_packages": Sequence[NonEmptyStr],
    "resume": NonEmptyStr | None,
    "n_trials": PositiveInt,
    "study_name": StudyName,  # SQLite's URL of the study's file would end at ? or #
    "storage": NonEmptyStr | None,
    "heartbeat": PositiveInt,
}
ROOT_NODES = "hydra", "init_from", "output_dir", "pruner", "sampler"  # and the config groups
# Keys of config nodes that are not arguments of their _target_ but read by src.training.instantiate.
NODE_KEYS: dict[str, dict[str, Any]] = {
    "optimizer": {"groups": None},
    "scheduler": {"interval": Literal["step", "epoch"] | None, "monitor": NonEmptyStr | None},
}
_UNLIMITED = PositiveInt | Literal[-1]
_BATCHES = NonNegativeInt | UnitInterval | None
# Arguments of other packages' classes whose own error messages are missing or come late.
LIBRARY_ARGUMENTS: dict[str, dict[str, Any]] = {
    "torch.optim.*": {
        "lr": PositiveFloat,
        "momentum": Probability,
        "weight_decay": NonNegativeFloat,
        "nesterov": bool,
        "betas": tuple[Probability, Probability],
    },
    "torch.optim.lr_scheduler.*": {
        "pct_start": UnitInterval,
        "div_factor": PositiveFloat,
        "final_div_factor": PositiveFloat,
        "T_max": PositiveInt,  # the default is trainer.max_epochs, which may be -1
    },
    "lightning.Trainer": {
        **dict.fromkeys(("max_epochs", "max_steps"), _UNLIMITED),
        **dict.fromkeys(("num_nodes", "log_every_n_steps", "accumulate_grad_batches"), PositiveInt),
        **dict.fromkeys(("limit_train_batches", "val_check_interval"), PositiveInt | PositiveFraction | None),
        **dict.fromkeys(("limit_val_batches", "limit_test_batches"), _BATCHES),
        "gradient_clip_val": NonNegativeFloat | None,
        "check_val_every_n_epoch": PositiveInt | None,
    },
}
CALLBACKS = "lightning.pytorch.callbacks"
# Arguments, and classes as a whole, that would be ignored or fail during the training, with what to type instead.
REFUSED_ARGUMENTS: dict[Any, str] = {
    ("lightning.Trainer", "callbacks"): "+callbacks.NAME={_target_: …} adds one",
    ("lightning.Trainer", "logger"): "logger=NAME sets it",
    (f"{CALLBACKS}.BatchSizeFinder", "_target_"): "-m data.batch_size=64,128 compares sizes",
    (f"{CALLBACKS}.ModelPruning", "_target_"): "a pruned run cannot be resumed",
    (f"{CALLBACKS}.SpikeDetection", "_target_"): "a loss that is not finite ends a run in any case",
    (f"{CALLBACKS}.ThroughputMonitor", "_target_"): "metrics.json has samples_per_second",
}
SIMPLE_TYPES = {
    bool: Constraint("true or false", lambda x: type(x) is bool),
    int: Constraint("int", lambda x: type(x) is int),
    float: Constraint("float", lambda x: type(x) in (int, float)),
    str: Constraint("string", lambda x: type(x) is str),
    types.NoneType: Constraint("null", lambda x: x is None),
}


def to_constraint(annotation: Any) -> Constraint | None:
    """Return the constraint that an annotation describes; None for one that a plain value cannot be checked against."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return arguments[1]
    if origin is Literal:
        options = ("one of " if len(arguments) > 1 else "") + ", ".join(map(str, arguments))
        return Constraint(options, lambda x: any(x == option and type(x) is type(option) for option in arguments))
    parts = [part for part in map(to_constraint, arguments) if part]
    if origin in (Union, types.UnionType) and len(parts) == len(arguments):
        description = " or ".join(part.description for part in parts)
        return Constraint(description, lambda x: any(part.is_satisfied_by(x) for part in parts))
    if origin is not None and issubclass(origin, Sequence) and parts:
        is_item, count = parts[0].is_satisfied_by, len(parts) if origin is tuple and ... not in arguments else None
        description = f"list of {f'{count} × ' if count else ''}{parts[0].description}"
        return Constraint(
            description, lambda x: isinstance(x, list) and len(x) == (count or len(x)) and all(map(is_item, x))
        )
    return SIMPLE_TYPES.get(annotation)
