"""Files that are replaced in one step."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # not on Windows, where processes do not exclude one another
    fcntl = None  # type: ignore[assignment]

from .errors import InputError, WriteError


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
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        before = "; the earlier file is unchanged" if path.exists() else ""
        raise WriteError(f"cannot write {path} ({error.strerror or error}): free some space{before}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Inside, no other process is inside with the same lock file, which stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as stream:
        if fcntl:
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file unlocks it
