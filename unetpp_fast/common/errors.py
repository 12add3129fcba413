"""The errors whose message is meant for the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what to do."""


class WriteError(InputError, OSError):
    """A file could not be written; an earlier version of it is unchanged."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]
