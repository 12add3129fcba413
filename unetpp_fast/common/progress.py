"""Progress bars where tqdm is installed."""

from __future__ import annotations

import contextlib
import types
from typing import Any

from .errors import InputError
from .extras import need


def progress_bar(**options: Any) -> Any:
    """tqdm's bar with these options where it is installed, else one that shows nothing."""
    try:
        return need("tqdm", "commands").tqdm(**options)
    except InputError:
        return contextlib.nullcontext(types.SimpleNamespace(update=lambda: None))
