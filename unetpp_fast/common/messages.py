"""What a command says on its way to the result: nothing with --quiet, more with --verbose."""

from __future__ import annotations

import sys

QUIET, NORMAL, VERBOSE = range(3)
_level = NORMAL


def set_level(level: int) -> None:
    """QUIET, NORMAL or VERBOSE, for this process."""
    global _level
    _level = level


def shown() -> bool:
    """Whether progress is shown."""
    return _level > QUIET


def verbose() -> bool:
    """Whether details are shown."""
    return _level == VERBOSE


def say(text: str) -> None:
    """Prints a line about progress."""
    if shown():
        print(text, flush=True)


def detail(text: str) -> None:
    """Prints details to stderr, if they are shown."""
    if verbose():
        print(text, file=sys.stderr, flush=True)
