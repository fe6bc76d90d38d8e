"""Small helpers for files and error messages. Standard library alone."""

import contextlib
import os
from typing import Callable


def replace_file(path: str | os.PathLike, write: Callable[[str], object], sync: bool = False) -> None:
    """Write a file under a temporary name, then rename it, so that `path` never holds half a file.

    Args:
        path: the file's final name. The temporary name is `path` + ".tmp": the same for every attempt, so that an
            interrupted attempt leaves at most one file, which the next attempt overwrites.
        write: called with the temporary name; it creates that file.
        sync: also wait until the file and its new name are on disk.
    Raises: whatever `write` raises, and OSError. The temporary file is removed first.
    """
    path = os.fspath(path)
    temporary = path + ".tmp"
    try:
        write(temporary)
        if sync:
            sync_to_disk(temporary)
        os.replace(temporary, path)
        if sync and os.name == "posix":
            sync_to_disk(os.path.dirname(path) or ".")
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def sync_to_disk(path: str) -> None:
    """Wait until a file's content, or a folder's list of names, is on disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def error_line(error: BaseException) -> str:
    """Return the last line of an exception's message; the name of its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]
