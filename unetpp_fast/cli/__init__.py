"""The command `unetpp-fast`, one file per sub-command."""

from .parser import main

__all__ = ["main"]
