"""Annotations for constructor arguments that a config sets; src.core.config checks every value against them."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple


class Constraint(NamedTuple):
    """A description for messages and the predicate that a value has to satisfy."""

    description: str
    is_satisfied_by: Callable[[Any], bool]


def _float(description: str, is_in_range: Callable[[float], bool]) -> Constraint:
    def is_satisfied_by(x: Any) -> bool:
        return type(x) in (int, float) and abs(x) <= sys.float_info.max and is_in_range(x)

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
