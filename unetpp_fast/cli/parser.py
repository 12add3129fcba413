"""The command `unetpp-fast`: demo, train, compare, predict, bench. A mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from ..common.errors import InputError
from ..common.version import __version__
from ..training import processes
from . import bench, compare, demo, predict, train

INTERRUPTED = 130
LOST = 1


class Parser(argparse.ArgumentParser):
    """Says a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except (InputError, OSError) as error:
        print(f"unetpp-fast {options.command}: error: {error}", file=sys.stderr)
        return 2
    except processes.Lost as error:
        print(f"unetpp-fast {options.command}: {error}: the same command with --resume goes on", file=sys.stderr)
        return LOST
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        print(f"unetpp-fast {options.command}: error: out of memory: use a smaller batch, patch or network", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"unetpp-fast {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED


def _is_lack_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def build_parser() -> Parser:
    """The parser of every command."""
    parser = Parser(prog="unetpp-fast", description="UNet++: train it, use it, prune it.")
    parser.add_argument("--version", action="version", version=f"unetpp_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{demo,train,compare,predict,bench}")
    for command in (demo, train, compare, predict, bench):
        command.add_parser(commands)
    return parser
