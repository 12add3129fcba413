"""Optional dependencies."""

from __future__ import annotations

from typing import Any

from .errors import InputError


def need(module: str, extra: str | None = None) -> Any:
    """Imports an optional dependency.

    Args:
        module: its dotted name.
        extra: the extra of this package that installs it, if there is one.

    Raises:
        InputError: the module cannot be imported; the message gives the command that installs it.
    """
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        name = module.split(".")[0]
        wanted = f"'unetpp_fast[{extra}]'" if extra else name
        raise InputError(f"{name} is missing: pip install {wanted}") from error
