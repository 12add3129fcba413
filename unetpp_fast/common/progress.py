"""Progress bars, shown if tqdm is installed and the command is not quiet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from . import messages
from .errors import InputError
from .extras import need


def progress_bar(iterable: Iterable | None = None, **options: Any) -> Any:
    """tqdm's bar with these options; without tqdm, or with --quiet, a bar with the same methods that shows nothing."""
    if not messages.shown():
        return SilentBar(iterable, **options)
    try:
        return need("tqdm", "commands").tqdm(iterable, **options)
    except InputError:
        return SilentBar(iterable, **options)


class SilentBar:
    """The part of tqdm's interface that this package uses; it only counts."""

    def __init__(self, iterable: Iterable | None = None, initial: float = 0, **options: Any) -> None:
        self.iterable, self.n = iterable, initial

    def __enter__(self) -> SilentBar:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def __iter__(self) -> Iterator:
        for item in self.iterable or ():
            yield item
            self.update()

    def update(self, n: float = 1) -> None:
        """Advances the count by `n`."""
        self.n += n

    def set_postfix(self, **values: object) -> None:
        """Shows nothing."""

    def set_postfix_str(self, text: str = "") -> None:
        """Shows nothing."""
