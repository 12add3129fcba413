"""The command `unetpp-fast`. A mistake of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from ..common.errors import InputError
from ..common.version import __version__
from ..training import processes
from . import bench, compare, demo, info, predict, train

COMMANDS = (demo, train, compare, predict, bench, info)
INTERRUPTED = 130
LOST = 1


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """A command's parser names the options it does not know itself, with those that are alike; argparse would leave them
        to the parser of all commands."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown and self.get_default("run"):
            alike = {near: None for name in unknown for near in difflib.get_close_matches(name, self._option_string_actions)}
            hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (InputError, OSError) as error:
        print(f"unetpp-fast {options.command}: error: {error}", file=sys.stderr)
        return 2
    except processes.Lost as error:
        print(f"unetpp-fast {options.command}: {error}: the same command with --resume continues", file=sys.stderr)
        return LOST
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"unetpp-fast {options.command}: error: out of memory: use a smaller batch, patch or network", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"unetpp-fast {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(prog="unetpp-fast", description="Train, use and prune UNet++.")
    parser.add_argument("--version", action="version", version=f"unetpp_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
