"""Files that are replaced and locked, on Windows too, whose calls are imitated; `test_long_runs.py` has full disks."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from unetpp_fast.common import atomic_files
from unetpp_fast.common.errors import WriteError


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "WINDOWS", True)
    monkeypatch.setattr(atomic_files, "SECONDS_OPEN", 0.3)


def held(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The file is open elsewhere, the first `times` times that it is to be replaced."""
    replace, failures = os.replace, iter(range(times))

    def refuse(source, target):
        if next(failures, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(atomic_files.os, "replace", refuse)


def write(path: Path) -> None:
    atomic_files.write_atomic(path, lambda stream: stream.write(b"new"))


def test_windows_waits_until_a_file_is_closed(windows, tmp_path: Path, monkeypatch):
    held(monkeypatch, 2)
    write(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_windows_says_that_a_file_stays_open(windows, tmp_path: Path, monkeypatch):
    (tmp_path / "a").write_bytes(b"old")
    held(monkeypatch, 1000)
    with pytest.raises(
        WriteError, match=r"Access is denied\): close the program that has it open; the earlier file is unchang"
    ):
        write(tmp_path / "a")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_other_systems_do_not_wait(tmp_path: Path, monkeypatch):
    held(monkeypatch, 1)
    with pytest.raises(WriteError, match="Access is denied"):
        write(tmp_path / "a")


def test_windows_waits_for_a_lock(windows, tmp_path: Path, monkeypatch):
    """Of the first byte of an empty file; its system gives up after ten seconds, and says so by an error."""
    answers = iter([OSError(errno.EDEADLK, "Resource deadlock avoided"), None])

    def locking(number: int, mode: str, count: int) -> None:
        assert (os.lseek(number, 0, os.SEEK_CUR), mode, count) == (0, "lock", 1)
        if error := next(answers):
            raise error

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK="lock"))
    with atomic_files.locked(tmp_path / "a" / "lock"):
        assert next(answers, "none left") == "none left"
    assert (tmp_path / "a" / "lock").read_bytes() == b""


def test_a_lock_that_cannot_be_had_is_an_error(windows, tmp_path: Path, monkeypatch):
    def locking(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK="lock"))
    with pytest.raises(OSError, match="Invalid argument"), atomic_files.locked(tmp_path / "lock"):
        pass
