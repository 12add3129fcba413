"""The names of classes, which are those of folders too."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from ..common.errors import InputError, first_line


def read_names(path: Path) -> list[str]:
    """The names of the classes in a file: one per line, or JSON, a list or an object of names and values.

    Raises:
        InputError: the file cannot be read, the values are not 0, 1, 2, ..., or a name cannot be that of a folder.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix.lower() == ".json" else [line.strip() for line in text.splitlines()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as names of classes ({first_line(error)})") from error
    if isinstance(content, dict):  # {"background": 0, ...} or {"0": "background", ...}
        turned = all(isinstance(name, str) for name in content.values())
        numbers = {str(value): name for name, value in content.items()} if not turned else content
        content = [numbers.get(str(index)) for index in range(len(numbers))]
    names = [name for name in content if name != ""] if isinstance(content, list) else []
    plain = all(isinstance(name, str) and Path(name).name == name and name not in (".", "..") for name in names)
    if len(names) < 2 or not plain or len(set(names)) < len(names):
        raise InputError(f"{path} names the classes {content!r}: expected 2 or more different plain names, of 0 first")
    return names


def folder_names(names: Iterable[object], path: Path) -> list[str]:
    """The names that a data set gives its classes, as those of folders: with - for /.

    Raises:
        InputError: two are the same, or one is empty; the message names the file `path`.
    """
    found = [str(name).strip().replace("/", "-").replace("\\", "-") for name in names]
    if len(set(found)) < len(found) or any(name in ("", ".", "..") for name in found):
        raise InputError(f"{path} names the classes {found}: expected different names")
    return found
