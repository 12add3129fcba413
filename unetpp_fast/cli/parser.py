"""The command `unetpp-fast`. A mistake of the user is one line on stderr and exit code 2."""

from __future__ import annotations

import argparse
import difflib
import io
import json
import platform
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import torch

from ..common import messages
from ..common.errors import InputError
from ..common.version import __version__
from ..training import processes
from . import app, bench, compare, completion, config, demo, info, predict, train

COMMANDS = (demo, train, compare, predict, app, bench, info, completion)
BEGIN = """begin with:
  unetpp-fast demo
  unetpp-fast train --data DATA --out RUN
  unetpp-fast predict --checkpoint RUN/best.pt --images IMAGES --out OUT

unetpp-fast COMMAND --help tells the options of a command."""
INTERRUPTED = 130
LOST = 1


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """A command's options, first from the command line, then from its --config.

        Its parser names the options it does not know itself, with those that are alike; argparse would leave them to the
        parser of all commands."""
        command = bool(self.get_default("run"))
        if command and not {"-h", "--help"} & set(args):
            namespace, given = self._from_file(args)
            namespace.given = frozenset(given)
            with self._changed(set(vars(namespace))):
                options, unknown = super().parse_known_args(args, namespace)
        else:
            options, unknown = super().parse_known_args(args, namespace)
        if unknown and command:
            alike = {near: None for name in unknown for near in difflib.get_close_matches(name, self._option_string_actions)}
            hint = f"; did you mean {' or '.join(alike)}?" if alike else ""
            if all(name.replace(".", "", 1).isdecimal() for name in unknown):
                hint = "; lists of numbers take commas, without spaces, such as 16,32"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return options, unknown

    def _from_file(self, args: Sequence[str]) -> tuple[argparse.Namespace, set[str]]:
        """The options in the file of --config, and the names of those that the command line gives."""
        with self._changed(None):
            options, _ = super().parse_known_args(args, argparse.Namespace())
        given = set(vars(options)) - set(self._defaults)
        if "config" not in given:
            return argparse.Namespace(), given
        try:
            return argparse.Namespace(**config.options_of(options.config, self, given)), given
        except InputError as error:
            self.error(str(error))

    @contextmanager
    def _changed(self, known: set[str] | None) -> Iterator[None]:
        """Inside, options that are known already are not required; with None no option is, and none has a default."""
        before = [(action, action.required, action.default) for action in self._actions]
        groups = [(group, group.required) for group in self._mutually_exclusive_groups]
        for action in self._actions:
            action.required = action.required and known is not None and action.dest not in known
            action.default = argparse.SUPPRESS if known is None else action.default
        for group in self._mutually_exclusive_groups:
            there = known is None or any(action.dest in known for action in group._group_actions)
            group.required = group.required and not there
        try:
            yield
        finally:
            for action, required, default in before:
                action.required, action.default = required, default
            for group, required in groups:
                group.required = required


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # what the system's code page lacks, in names of files, is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    options = build_parser().parse_args(arguments)
    messages.set_level(messages.QUIET if options.quiet else messages.VERBOSE if options.verbose else messages.NORMAL)
    messages.detail(f"unetpp_fast {__version__}, torch {torch.__version__}, Python {platform.python_version()}")
    messages.detail(json.dumps(config.settings(options), default=str))
    try:
        return options.run(options) or 0
    except (InputError, OSError) as error:
        if messages.verbose():
            traceback.print_exc()
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
    parser = Parser(
        prog="unetpp-fast", usage="unetpp-fast COMMAND [options]", description="Train, use and prune UNet++.", epilog=BEGIN,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(root=parser)
    parser.add_argument("--version", action="version", version=f"unetpp_fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, title="commands", metavar="COMMAND", prog=parser.prog)
    for command in COMMANDS:
        command.add_parser(commands)
    return parser
