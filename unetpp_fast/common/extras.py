"""Optional dependencies."""

from __future__ import annotations

from typing import Any

from .errors import InputError


def need(module: str, extra: str) -> Any:
    """Imports an optional dependency, or says which extra brings it."""
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise InputError(f"{module.split('.')[0]} is missing: pip install 'unetpp_fast[{extra}]'") from error
