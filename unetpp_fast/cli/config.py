"""Options in a file: `--config run.yaml` gives a command those that its command line leaves out."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

from ..common.atomic_files import write_atomic
from ..common.errors import InputError, first_line
from ..common.extras import need
from ..common.version import __version__
from .arguments import image_size, tile_size

NOT_SETTINGS = ("command", "config", "given", "help", "parser", "quiet", "resume", "root", "run", "verbose")
PLAIN = re.compile(r"[A-Za-z/][\w./+-]*")
RESERVED = ("true", "false", "yes", "no", "on", "off", "null")  # plain words that YAML takes for something else


def read(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML (or JSON) file.

    Raises:
        InputError: it cannot be read, is not YAML, or holds no keys.
    """
    yaml = need("yaml", "commands")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not text: expected a file such as a training's run.yaml") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where} is not YAML: {getattr(error, 'problem', None) or first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no options: expected lines such as `epochs: 100`")
    return content


def options_of(path: Path, parser: argparse.ArgumentParser, given: Container[str]) -> dict[str, Any]:
    """The options in a file, checked as if they were on the command line.

    Args:
        parser: of the command.
        given: names, as in its namespace, of options that the command line gives: these, and those that exclude them, are
            left out.

    Raises:
        InputError: a key is no option of the command, or a value is none of that option.
    """
    actions = _actions(parser)
    excluded = {
        other.dest
        for group in parser._mutually_exclusive_groups
        if any(action.dest in given for action in group._group_actions)
        for other in group._group_actions
    }
    found: dict[str, Any] = {}
    for key, value in read(path).items():
        action = actions.get(str(key).replace("-", "_"))
        if action is None:
            near = difflib.get_close_matches(str(key), list(actions), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(f"{path}: {parser.prog} has no option {key!r}{hint}")
        if action.dest not in given and action.dest not in excluded and value is not None:
            try:
                found[action.dest] = _value(parser, action, value)
            except argparse.ArgumentError as error:
                raise InputError(f"{path}: {error.message}, for {key}") from error
    return found


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a command by their names in a file."""
    found: dict[str, Any] = {}
    for action in parser._actions:
        if action.dest in ("config", "help"):
            continue
        positive = action.option_strings
        if isinstance(action, argparse.BooleanOptionalAction):
            positive = [name for name in positive if not name.startswith("--no-")]
        found |= {name[2:].replace("-", "_"): action for name in positive if name.startswith("--")}
    return found


def _value(parser: argparse.ArgumentParser, action: argparse.Action, value: Any) -> Any:
    """The value of an option as argparse would give it."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise argparse.ArgumentError(None, f"expected true or false, not {value!r}")
        if isinstance(action, argparse.BooleanOptionalAction):
            return value
        return action.const if value else action.default
    if isinstance(value, (dict, bool)):
        raise argparse.ArgumentError(None, f"expected a value, not {value!r}")
    if not isinstance(value, list):
        return parser._get_values(action, [str(value)])
    texts = [str(item) for item in value]
    if action.nargs is not None:
        return parser._get_values(action, texts)
    if isinstance(action, argparse._AppendAction):
        return [parser._get_values(action, [text]) for text in texts]
    separator = "x" if action.type in (tile_size, image_size) else ","
    return parser._get_values(action, [separator.join(texts)])


def write(path: Path, options: argparse.Namespace, **instead: Any) -> None:
    """Writes the options of a command as YAML, in the groups of its help, so that --config repeats it.

    Args:
        instead: values in place of those in the options; None leaves an option out.
    """
    values = {**vars(options), **instead}
    name = options.parser.prog
    lines = [f"# {name} of unetpp_fast {__version__}. The same again: {name} --config {path.name}"]
    for group in options.parser._action_groups:
        known = [action for action in group._group_actions if action.dest not in NOT_SETTINGS and action.dest in values]
        texts = {action.dest: _text(action, values[action.dest], action.dest in instead) for action in known}
        written = [f"{dest}: {text}" for dest, text in texts.items() if text is not None]
        lines += ["", f"# {group.title}", *written] if written else []
    write_atomic(path, lambda stream: stream.write("\n".join([*lines, ""]).encode()))


def _text(action: argparse.Action, value: Any, dropped: bool) -> str | None:
    """A value as YAML; None if the option is at a default of None, or was dropped."""
    if value is None:
        return None if dropped or action.default in (None, argparse.SUPPRESS) else "none"
    if isinstance(value, Path):
        value = str(value.resolve())
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in RESERVED:
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def settings(options: argparse.Namespace, **instead: Any) -> dict[str, Any]:
    """The options of a command, in the order of its help, without what says how it was called; `instead` as in `write`."""
    values = {**vars(options), **instead}
    names = (action.dest for group in options.parser._action_groups for action in group._group_actions)
    return {name: values[name] for name in names if name in values and name not in NOT_SETTINGS}
