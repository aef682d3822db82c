"""Atomic writes and locks on folders."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from src.core.errors import UserError
from src.core.process import is_first_process


def write_atomically(file: Path, content: bytes | memoryview) -> None:
    """Write `content` to a temporary file and rename it: the previous file stays until the new one is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def exclusive_lock(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on a run folder, which ends with this process. Raise UserError if another holds it."""
    from filelock import FileLock, Timeout  # slow to import

    try:
        with FileLock(folder / ".lock", timeout=0) if is_first_process() else nullcontext():
            yield
    except Timeout as error:
        raise UserError(f"{folder}: another process is using this run folder; wait for it or stop it") from error
