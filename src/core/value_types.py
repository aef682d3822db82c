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
BlurFraction = Annotated[float, "0 ≤ float ≤ 0.25", lambda x: 0 <= x <= 0.25]
NonEmptyStr = Annotated[str, "non-empty string", lambda text: text != ""]
# A test score must not choose anything.
MetricName = Annotated[str, "metric other than test/…", lambda text: text[:5] not in ("", "test/")]

# Keys of conf/train.yaml and conf/tune.yaml that are no class's arguments.
ROOT_KEYS: dict[str, Any] = {
    "name": NonEmptyStr,
    "seed": Seed,
    "threads": PositiveInt | None,
    "test": Literal["last", "best"] | bool,  # true: last
    "optimized_metric": MetricName | None,
    "optimized_mode": Literal["max", "min"] | None,
    "allowed_packages": Sequence[NonEmptyStr],
    "resume": NonEmptyStr | None,
    "n_trials": PositiveInt,
    "study_name": NonEmptyStr,
    "storage": NonEmptyStr | None,
    "heartbeat": PositiveInt,
    **dict.fromkeys(("init_from", "output_dir", "sampler", "pruner"), Any),
}
# Keys of config nodes that are not arguments of their _target_ but read by src.training.instantiate.
NODE_KEYS: dict[str, dict[str, Any]] = {
    "optimizer": {"groups": Any},
    "scheduler": {"interval": Literal["step", "epoch"] | None, "monitor": NonEmptyStr | None},
}
# Narrower than the annotations of the libraries, whose own error messages are missing or come late.
LIBRARY_ARGUMENTS: dict[str, dict[str, Any]] = {
    "torch.optim.lr_scheduler.": {"T_max": PositiveInt},  # the default is trainer.max_epochs, which may be -1
    "torch.optim.": {"lr": PositiveFloat, "momentum": Probability, "weight_decay": NonNegativeFloat},
    "lightning.Trainer": {
        **dict.fromkeys(("max_epochs", "max_steps"), PositiveInt | Literal[-1]),
        **dict.fromkeys(("num_nodes", "log_every_n_steps", "accumulate_grad_batches"), PositiveInt),
        **dict.fromkeys(("callbacks", "logger"), types.NoneType),  # the groups callbacks and logger set them
        "gradient_clip_val": NonNegativeFloat | None,
        "precision": Literal["auto", "32-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true", "64-true"],
    },
}
# Callbacks that would fail during the training or a resume, or do nothing, with the reason.
REFUSED_TARGETS = {
    "lightning.pytorch.callbacks.BatchSizeFinder": "-m data.batch_size=64,128 compares sizes",
    "lightning.pytorch.callbacks.GradientAccumulationScheduler": "trainer.accumulate_grad_batches is for all epochs",
    "lightning.pytorch.callbacks.LearningRateFinder": "-m optimizer.lr=0.01,0.03,0.1 compares learning rates",
    "lightning.pytorch.callbacks.ModelPruning": "a pruned run cannot be resumed",
    "lightning.pytorch.callbacks.SpikeDetection": "a loss that is not finite ends a run in any case",
    "lightning.pytorch.callbacks.ThroughputMonitor": "metrics.json has samples_per_second",
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
