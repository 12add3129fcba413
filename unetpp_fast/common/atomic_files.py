"""Files that are replaced in one step."""

from __future__ import annotations

import errno
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from .errors import InputError, WriteError

WINDOWS = os.name == "nt"
SECONDS_OPEN = 2.0  # for which a file may be open elsewhere: Windows replaces no open file, and virus scanners open new ones


def check_folder(folder: Path) -> None:
    """Creates the folder `folder` if it does not exist.

    Raises:
        InputError: it cannot be created, or no file can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise InputError(f"cannot write to the folder {folder} ({error.strerror}): choose another --out") from error


def write_atomic(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a temporary file in the same folder and renames it to `path`: a reader sees the old file or the new one.

    Raises:
        WriteError: the disk is full, or fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        _replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        before = "; the earlier file is unchanged" if path.exists() else ""
        advice = "close the program that has it open" if _is_open(error) else "free some space"
        raise WriteError(f"cannot write {path} ({error.strerror or error}): {advice}{before}") from error


def _is_open(error: OSError) -> bool:
    return WINDOWS and isinstance(error, PermissionError)


def _replace(name: str, path: Path) -> None:
    end = time.monotonic() + SECONDS_OPEN
    while True:
        try:
            return os.replace(name, path)
        except OSError as error:
            if not _is_open(error) or time.monotonic() > end:
                raise
        time.sleep(0.05)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same lock file, which stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as stream:
        _lock(stream)
        yield  # closing the file unlocks it


def _lock(stream: IO) -> None:
    if not WINDOWS:
        import fcntl

        return fcntl.flock(stream, fcntl.LOCK_EX)
    import msvcrt

    while True:
        try:
            return msvcrt.locking(stream.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            if error.errno != errno.EDEADLK:  # another has had it for ten seconds
                raise
