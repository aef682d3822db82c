"""Run a function as a program with plain arguments; a user's mistake is one line and exit code 2."""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from src.core.error_messages import exit_on_error
from src.core.errors import UserError

VERSION = "0.1.0"


class Parser(argparse.ArgumentParser):
    """Raise UserError for wrong arguments instead of printing the usage; --version is the project's."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.add_argument("--version", action="version", version=f"digitlab {VERSION}")

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; type {self.prog} --help for the arguments")


def argparse_main(task: Callable[[], int | None]) -> Callable[[], None]:
    """Return the program that calls `task` and exits with what it returns."""

    @functools.wraps(task)
    def main() -> None:
        with exit_on_error():
            sys.exit(task())

    return main
