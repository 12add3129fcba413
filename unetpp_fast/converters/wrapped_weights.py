"""Finds the weights of a network in what programs save: dictionaries in dictionaries, names behind the names of wrappers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

OWN = r"(nodes\.x\d_\d\.|heads\.x0_\d\.|last\.(conv|norm)[12]\.|head\.(weight|bias)$)"  # names of this package
DEPTH = 3  # of dictionaries in one another, and of attributes in a prefix
COUNTERS = ("n_averaged",)  # of wrappers, beside the weights

State = Mapping[str, Tensor]
Claims = Callable[[State], int]


@dataclass(frozen=True)
class Found:
    """Weights: where their dictionary is, the prefix that their names have there, how many look like a network's, and the
    names of the dictionary that do not have the prefix."""

    place: tuple[str, ...]
    prefix: str
    count: int
    state: State
    others: tuple[str, ...]

    @property
    def where(self) -> str:
        """In words, for an error."""
        keys = "".join(f"[{key!r}]" for key in self.place)
        return f"{keys or 'the dictionary'}{f', names that begin with {self.prefix!r}' if self.prefix else ''}"


def find(source: Mapping[str, Any], claims: Claims) -> Found | None:
    """The weights of a network in a checkpoint; None if nothing in it looks like any.

    claims: how many of the names in a state look like those of a known network.

    Raises:
        ValueError: there are several networks, such as a model and its moving average; the message says how to choose.
    """
    candidates = [found for place, state in _states(source) for found in _by_prefix(place, state, claims)]
    most = max((found.count for found in candidates), default=0)
    best = [found for found in candidates if found.count == most]
    if not best:
        return None
    if len(best) > 1:
        listed = "; ".join(found.where for found in best)
        raise ValueError(f"there are several networks in it ({listed}): give only the names and weights of one")
    others = [name for name in best[0].others if name not in COUNTERS]
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        warnings.warn(f"left out, beside the network's weights: {', '.join(others[:3])}{more}", stacklevel=3)
    return best[0]


def _states(source: Mapping[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every dictionary with tensors by name, and where it is."""
    tensors = {name: value for name, value in source.items() if isinstance(name, str) and _is_array(value)}
    if tensors:
        yield place, tensors
    for name, value in source.items():
        if isinstance(value, Mapping) and isinstance(name, str) and len(place) < DEPTH:
            yield from _states(value, (*place, name))


def _is_array(value: object) -> bool:
    return isinstance(value, (Tensor, np.ndarray))


def _by_prefix(place: tuple[str, ...], state: dict[str, Any], claims: Claims) -> Iterator[Found]:
    """What the names look like behind each prefix that some of them have."""
    prefixes = {""}
    for name in state:
        parts = name.split(".")
        prefixes.update(".".join(parts[:count]) + "." for count in range(1, min(DEPTH, len(parts) - 1) + 1))
    for prefix in sorted(prefixes):
        inner = {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}
        if count := claims(inner):
            others = tuple(name for name in state if not name.startswith(prefix))
            yield Found(place, prefix, count, inner, others)


def own_names(state: State) -> int:
    """How many names look like those of a network of this package."""
    return sum(re.match(OWN, name) is not None for name in state)
