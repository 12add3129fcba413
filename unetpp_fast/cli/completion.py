"""`unetpp-fast completion`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..common.extras import need
from .arguments import Commands, add_command

SHELLS = ("bash", "zsh", "fish")


def add_parser(commands: Commands) -> None:
    """Adds `completion` to the commands."""
    command = add_command(
        commands, "completion", run, "Print a script with which a shell completes the options of this command.",
        usage="bash|zsh|fish", config=False,
    )  # fmt: skip
    command.add_argument("shell", choices=SHELLS, help='bash: eval "$(unetpp-fast completion bash)" in ~/.bashrc')


def run(options: argparse.Namespace) -> None:
    """Prints the script of the shell.

    Raises:
        InputError: shtab is not installed.
    """
    shtab = need("shtab", "completion")
    for command in _commands(options.root):
        for action in command._actions:
            if action.type is Path:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(options.root, options.shell))


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    (choices,) = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return list(choices.values())
