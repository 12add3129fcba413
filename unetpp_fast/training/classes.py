"""The classes in a checkpoint: their names, and the colours of those that exclude one another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..common.errors import InputError


def palette(network: nn.Module, about: Mapping[str, Any]) -> list[list[int]] | None:
    """The colours of exclusive classes in a checkpoint.

    Raises:
        InputError: they are not three bytes for each class.
    """
    if not about.get("exclusive"):
        return None
    colours = about.get("palette")
    known = isinstance(colours, list) and len(colours) == network.out_channels
    if not known or any(_bytes_of(colour) is None for colour in colours):
        raise InputError(f"the checkpoint's palette is {colours!r}: expected {network.out_channels} colours of three bytes")
    return colours


def _bytes_of(colour: Any) -> bytes | None:
    """Three bytes, or None."""
    try:
        return bytes(colour) if len(colour) == 3 else None
    except (TypeError, ValueError):
        return None


def class_names(network: nn.Module, content: Mapping[str, Any]) -> list[str]:
    """The names of the classes in a checkpoint, or their numbers.

    Raises:
        InputError: a name cannot be that of a folder, or there are not as many as the network has outputs.
    """
    about = content.get("about") or {}
    classes = about.get("classes") or [str(index) for index in range(network.out_channels)]
    plain = isinstance(classes, list) and all(
        isinstance(name, str) and Path(name).name == name and name not in ("", "..") for name in classes
    )
    if not plain or len(classes) != network.out_channels:
        raise InputError(f"the checkpoint's classes are {classes!r}: expected {network.out_channels} plain name(s)")
    return classes
