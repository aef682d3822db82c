"""Which values the arguments of configs may have: annotations that src.core.config holds a config against."""

import sys
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple


class Rule(NamedTuple):
    words: str
    allows: Callable[[Any], bool]


def _number(words: str, within: Callable[[float], bool]) -> Rule:
    return Rule(f"a number {words}", lambda x: type(x) in (int, float) and abs(x) <= sys.float_info.max and within(x))


NonNegativeInt = Annotated[int, Rule("a whole number of 0 or more", lambda n: type(n) is int and n >= 0)]
PositiveInt = Annotated[int, Rule("a whole number of 1 or more", lambda n: type(n) is int and n >= 1)]
Seed = Annotated[int, Rule("a whole number from 0 to 4294967295", lambda n: type(n) is int and 0 <= n < 2**32)]
PositiveFloat = Annotated[float, _number("above 0", lambda x: x > 0)]
NonNegativeFloat = Annotated[float, _number("of 0 or more", lambda x: x >= 0)]
UnitInterval = Annotated[float, _number("from 0 to 1", lambda x: 0 <= x <= 1)]
PositiveFraction = Annotated[float, _number("above 0, and at most 1", lambda x: 0 < x <= 1)]
Probability = Annotated[float, _number("from 0 up to, but not including, 1", lambda x: 0 <= x < 1)]
BlurFraction = Annotated[float, _number("from 0 to 0.25", lambda x: 0 <= x <= 0.25)]
NonEmptyStr = Annotated[str, Rule("a text", lambda x: type(x) is str and x != "")]
StudyName = Annotated[str, Rule("a name without ? or #", lambda x: type(x) is str and bool(x) and not {*x} & {*"?#"})]
