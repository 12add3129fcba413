"""Memory for partial sums that the next launch adds up: inside `reused`, the same memory again and again.

A pass takes partial sums about a hundred times, one after another on one stream; each is read before the next is written.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

LEAST = 2**20  # values


class _State(threading.local):
    active = False
    buffer: Tensor | None = None


_state = _State()


@contextlib.contextmanager
def reused() -> Iterator[None]:
    """Inside, on this thread, `empty` gives memory that the next call of `empty` gives again."""
    if _state.active:
        yield
        return
    _state.active = True
    try:
        yield
    finally:
        _state.active, _state.buffer = False, None


def empty(like: Tensor, *shape: int) -> Tensor:
    """Contiguous float32 on the device of `like`; inside `reused`, valid until the next call."""
    size = math.prod(shape)
    if not _state.active:
        return like.new_empty(shape, dtype=torch.float32)
    buffer = _state.buffer
    if buffer is None or buffer.numel() < size or buffer.device != like.device:
        buffer = _state.buffer = like.new_empty(max(LEAST, 1 << (size - 1).bit_length()), dtype=torch.float32)
    return buffer.as_strided(shape, strides(shape))


def strides(shape: tuple[int, ...]) -> list[int]:
    """Those of a contiguous tensor."""
    steps = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        steps[axis - 1] = steps[axis] * shape[axis]
    return steps
