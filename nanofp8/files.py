"""Small helpers for files, console lines and error messages. Standard library alone."""

import contextlib
import errno
import os
import re
import sys
import time
from typing import Callable

FULL_OR_READ_ONLY = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk, a quota, the size of a file
FOLDER_FAULTS = (*FULL_OR_READ_ONLY, errno.ESTALE, errno.EIO)  # also: gone from its server, damaged


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
    """Wait until a file's content, or a folder's list of names, is on disk. Raises OSError.

    Some network file systems cannot sync a folder (EINVAL): there the wait is left out.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not os.path.isdir(path) or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def is_seen(path: str, seconds: float = 10.0) -> bool:
    """Whether a file or folder that another machine has just made exists here; wait for it for some seconds.

    A network file system may show it late.
    """
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def console(*words: object) -> None:
    """Print a line on stdout. If it cannot be written (a closed pipe or terminal, a full disk), drop it and later ones.

    A failure to report must never end a run. Characters that the console's encoding lacks are printed as \\u codes.
    """
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = " ".join(map(str, words))
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
    except (OSError, ValueError):  # ValueError: stdout is closed
        with contextlib.suppress(OSError, ValueError):  # what is still buffered must not fail at exit
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message; the name of its type if it has no message.

    Exceptions of torch.compile, CUDA and the Hugging Face Hub give the cause first and general advice after it.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def error_line(error: BaseException) -> str:
    """Return the last line of an exception's message, where most say what happened, or CUDA's line; the name of its
    type if it has no message.

    The calls in C++ that torch lists after some messages are left out, and NCCL's last line where it says nothing.
    """
    message = re.split(r"\n?(?:Exception raised from |C\+\+ CapturedTraceback)", str(error))[0].strip()
    lines = message.removesuffix("Last error:").strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if line.startswith("CUDA error")), lines[-1])  # torch adds advice after CUDA's
