"""The command `unetpp-fast`, run in this process."""

from __future__ import annotations

from pathlib import Path

from unetpp_fast.cli import parser


def run(*arguments: str | Path) -> int:
    """The exit code of `unetpp-fast` with these arguments."""
    try:
        return parser.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def fails(capsys, *arguments: str | Path) -> str:
    """The one line that a mistake prints."""
    capsys.readouterr()
    assert run(*arguments) == 2
    text = capsys.readouterr().err
    assert text.startswith("unetpp-fast") and text.count("\n") == 1 and "error: " in text
    return text
