"""The errors whose message is meant for the user."""

from __future__ import annotations


class InputError(ValueError):
    """Something the user gave cannot be used; the message names it and says what to do."""


class WriteError(InputError, OSError):
    """A file could not be written; what was there before is whole."""
