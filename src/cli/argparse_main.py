"""Plain command lines, for the mains that take paths; users' mistakes told in one line, exit code 2."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from io import TextIOWrapper
from typing import NoReturn

from src.core.errors import UserError, print_error, print_warnings_in_one_line


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows the arguments")


def argparse_main(task: Callable[[], int | None]) -> Callable[[], None]:
    """Makes a function the program of its file; what it returns is the exit code."""

    @functools.wraps(task)
    def program() -> None:
        print_warnings_in_one_line()
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may be any bytes
        try:
            code = task()
            sys.stdout.flush()
        except UserError as error:
            code = print_error(" ".join(str(error).split()))
        except BrokenPipeError:  # the reader has seen enough, as `head` has; spare Python's complaint at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except OSError as error:
            if error.filename is None:
                raise
            code = print_error(f"{error.filename}: {error.strerror}")
        except KeyboardInterrupt:
            code = 130
        sys.exit(code)

    return program
