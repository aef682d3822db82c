from __future__ import annotations  # a Python that is too old gets as far as this

import math
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType


class UserError(Exception):
    """A mistake the user can fix. Its message is one line that names the fix; the command line exits with 2."""


class DivergenceError(UserError):
    """A loss or a weight that is not finite: of this run's settings, not of the command."""


def parse_finite_numbers(key: str, values: Sequence[float], names: Sequence[str]) -> list[float]:
    """`values` as floats. Raises UserError, naming the config key, unless there is one finite number a name."""
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if len(numbers) != len(names) or not all(map(math.isfinite, numbers)):
        raise UserError(f"{key} needs {len(names)} finite numbers ({', '.join(names)}), not {values}")
    return numbers


def escape_control_characters(text: object) -> str:
    """In one line and without control codes: the names of files may have both."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def format_metric(name: str, value: float, digits: int = 3) -> str:
    """A score as people read it: an accuracy in percent, all else with so many digits."""
    return f"{100 * value:.2f} %" if name.endswith("acc") else f"{value:#.{digits}g}".rstrip(".")


def print_error(line: str) -> int:
    """Tells of a user's mistake; gives the exit code."""
    print(f"error: {escape_control_characters(line)}", file=sys.stderr)
    return 2


def print_warnings_in_one_line() -> None:
    """Warnings without the library's line of code that gave them."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def raise_system_exit(number: int, frame: FrameType | None) -> None:
    """For a signal: SystemExit with 128 + its number. At once while something is imported, which might swallow it."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"\nstopped by {signal.Signals(number).name}\n".encode())
            os._exit(128 + number)
        frame = frame.f_back
    raise SystemExit(128 + number)
