"""Exceptions for users' mistakes, and how they are printed. Imports nothing slow: every program needs this file."""

from __future__ import annotations  # lets a Python that is too old come as far as the message about it

import sys
import warnings


class UserError(Exception):
    """A mistake that the user can fix. Its message is one line that names the fix; the exit code is 2."""


class DivergenceError(UserError):
    """A loss or weight that is not finite, caused by the settings of this run."""


def escape_control_characters(text: object) -> str:
    """Escape line breaks and terminal codes, which names of files and classes may contain."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def format_metric(name: str, value: float, digits: int = 3) -> str:
    """Format a metric: accuracies in percent, others with `digits` significant digits."""
    return f"{100 * value:.2f}%" if name.endswith("acc") else f"{value:#.{digits}g}".rstrip(".")


def print_error(line: str) -> int:
    """Print `error: …` to stderr and return exit code 2."""
    print(f"error: {escape_control_characters(line)}", file=sys.stderr)
    return 2


def print_warnings_in_one_line() -> None:
    """Print warnings without the line of library code that raised them."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


def exit_on_signal(number: int, _: object) -> None:
    """Handle a signal: raise SystemExit with 128 + its number."""
    raise SystemExit(128 + number)
