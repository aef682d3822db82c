"""Atomic writes, locks and cleaning up."""

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path

from src.core.errors import UserError
from src.core.process import is_first_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def write_atomically(file: Path, content: bytes | memoryview) -> None:
    """What stood at `file` stays until all of `content` is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name}.part")
    try:
        with beside.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(file)) from error


def list_tree(folder: Path) -> set[Path]:
    """The folder and all in it; empty where it is not there."""
    return {folder, *folder.rglob("*")} if folder.exists() else set()


def remove_new_files(folder: Path, before: Set[Path]) -> None:
    """Takes away all that was not there `before`, as `content` tells it."""
    for part in sorted(list_tree(folder) - before, reverse=True):
        with suppress(OSError):
            part.unlink() if part.is_symlink() or not part.is_dir() else part.rmdir()


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Keeps other processes from the run in `folder`. Raises UserError where one is at work; ends with this process."""
    if not is_first_process() or fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{folder}: another process is at work on this run; wait for it, or stop it") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)
