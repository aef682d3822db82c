"""Annotations for what a config sets, and how a value is checked against them."""

import types
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

FLOAT32_MAX = 3.4028234663852886e38  # a larger number ends in an error of PyTorch

# Each with its description in messages and its range.
NonNegativeInt = Annotated[int, "int ≥ 0", lambda n: n >= 0]
PositiveInt = Annotated[int, "int ≥ 1", lambda n: n >= 1]
Seed = Annotated[int, "0 ≤ int < 4294967296", lambda n: 0 <= n < 2**32]
PositiveFloat = Annotated[float, "float > 0", lambda x: x > 0]
NonNegativeFloat = Annotated[float, "float ≥ 0", lambda x: x >= 0]
UnitInterval = Annotated[float, "0 ≤ float ≤ 1", lambda x: 0 <= x <= 1]
Probability = Annotated[float, "0 ≤ float < 1", lambda x: 0 <= x < 1]
NonEmptyStr = Annotated[str, "non-empty string", lambda text: text != ""]
# A test score must not choose anything.
MetricName = Annotated[str, "metric other than test/…", lambda text: text[:5] not in ("", "test/")]

# Keys that are no arguments of a class, or narrower than the annotation of a library's class.
RULES: dict[str, Any] = {
    "seed": Seed,
    "threads": PositiveInt | None,
    "test": Literal["last", "best"] | bool,  # true: last
    "optimized_metric": MetricName | None,
    "optimized_mode": Literal["max", "min"] | None,
    **dict.fromkeys(("n_trials", "heartbeat"), PositiveInt),
    **dict.fromkeys((f"trainer.{key}" for key in ("log_every_n_steps", "accumulate_grad_batches")), PositiveInt),
    "optimizer.lr": PositiveFloat,
    "optimizer.groups": Any,
    "scheduler.interval": Literal["step", "epoch"] | None,
    "scheduler.monitor": NonEmptyStr | None,
    "trainer.precision": Any,  # also auto; Lightning checks it
    **dict.fromkeys(("trainer.callbacks", "trainer.logger"), types.NoneType),  # the groups of these names set them
}
# Callbacks that would fail during the training or a resume, with the reason.
REFUSED_TARGETS = {
    "lightning.pytorch.callbacks.BatchSizeFinder": "-m data.batch_size=64,128 compares sizes",
    "lightning.pytorch.callbacks.GradientAccumulationScheduler": "trainer.accumulate_grad_batches is for all epochs",
    "lightning.pytorch.callbacks.ModelPruning": "a pruned run cannot be resumed",
}


def is_valid(value: Any, annotation: Any) -> bool:
    """Return whether a plain value satisfies an annotation; True for a class whose objects a config cannot hold."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return is_valid(value, arguments[0]) and all(test(value) for test in arguments[2:] if callable(test))
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in arguments)
    if origin in (Union, types.UnionType):
        return any(is_valid(value, part) for part in arguments)
    if isinstance(origin, type) and issubclass(origin, Sequence):
        count = len(arguments) if origin is tuple and ... not in arguments else None
        is_list = isinstance(value, list) and len(value) == (count or len(value))
        return is_list and all(is_valid(item, arguments[0]) for item in value)
    if annotation is float:
        return type(value) in (int, float) and abs(value) <= FLOAT32_MAX
    return type(value) is annotation or annotation not in (bool, int, str, types.NoneType)


def describe(annotation: Any) -> str:
    """Describe the values that satisfy an annotation, as in error messages."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return arguments[1] if isinstance(arguments[1], str) else describe(arguments[0])  # of another package
    if origin is Literal:
        return "one of " * (len(arguments) > 1) + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if isinstance(origin, type) and issubclass(origin, Sequence):
        count = f"{len(arguments)} × " if origin is tuple and ... not in arguments else ""
        return f"list of {count}{describe(arguments[0])}"
    names = {bool: "true or false", str: "string", types.NoneType: "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))
