"""Inference on a CPU: the fused forward pass over buffers that are kept between calls.

Large tensors that are freed go back to the system, and taking them again costs a page fault per page; so buffers are kept.
Images run in parts of a batch, so that memory does not grow with the batch.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..call import Inputs, inputs_of
from ..fused.buffers import Maps, full_size
from ..fused.forward import Forward
from ..fused.ops import load_ops
from ..fused.structure import Structure
from ..plan.operands import Modes
from ..plan.weight_composition import Operands

PIXELS_AT_ONCE = 2**16  # of the images of one part: enough that small maps of a batch fill the threads
KEPT_BUFFERS, KEPT_BYTES = 4, 2**30  # idle ones of this process, and their memory; the latest may be larger
Composed = Mapping[str, tuple[Operands, Operands]]


class Buffers:
    """The idle buffers of this process, the latest used ones kept; a call takes one for itself and gives it back."""

    def __init__(self) -> None:
        self._idle: list[tuple[tuple, Maps]] = []
        self._lock = threading.Lock()

    def take(self, key: tuple) -> Maps | None:
        """Buffers that were given back under this key, if there are any."""
        with self._lock:
            for place in reversed(range(len(self._idle))):
                if self._idle[place][0] == key:
                    return self._idle.pop(place)[1]
            self._drop(0)
        return None

    def give(self, key: tuple, maps: Maps) -> None:
        """Gives buffers back."""
        with self._lock:
            self._idle.append((key, maps))
            self._drop(1)

    def _drop(self, least: int) -> None:
        """Drops the oldest until the rest is within the bounds or only `least` are left."""
        while len(self._idle) > least and (
            len(self._idle) > KEPT_BUFFERS or sum(nbytes(maps) for _, maps in self._idle) > KEPT_BYTES
        ):
            del self._idle[0]

    def clear(self) -> None:
        """Frees the memory of all idle buffers."""
        with self._lock:
            self._idle.clear()


buffers = Buffers()


def nbytes(maps: Maps) -> int:
    """Bytes of the buffers of a pass."""
    tensors = [maps.image, *maps.levels, *maps.mids, *maps.level_tables, *maps.mid_tables, *maps.pools.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]  # some are shared
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def images_at_once(size: Sequence[int]) -> int:
    """How many images of a size run together."""
    pixels = 1
    for axis in size:
        pixels *= axis
    return max(1, PIXELS_AT_ONCE // max(1, pixels))


@torch.no_grad()
def run(
    structure: Structure,
    composed: Composed,
    parameters: Mapping[str, Tensor],
    modes: Modes,
    x: Inputs,
    dtype: torch.dtype,
    columns: Sequence[int] | None = None,
) -> list[Tensor]:
    """Logits `[N, classes, *S]` in `dtype` of the heads at `columns` (default all), for `[N, C, *S]` or the given maps.

    Args:
        composed: from `all_operands`. parameters: by name, buffers too. modes: of the norms (`Forward`).
    """
    plan, inputs = structure.plan, inputs_of(x)
    size, count = full_size(plan, inputs), inputs[0].shape[0]
    columns = plan.topology.heads if columns is None else columns
    logits = [inputs[0].new_empty((count, structure.out_channels, *size), dtype=dtype) for _ in columns]
    raw, start = any(mode != "folded" for mode in modes.values()), 0
    with torch.autocast("cpu", enabled=False):
        for images in zip(*(tensor.split(images_at_once(size)) for tensor in inputs), strict=True):
            if not len(images[0]):
                break
            key = (structure.handle, tuple(images[0].shape), dtype, raw)
            forward = Forward(plan, load_ops("cpu"), modes, parameters, dtype, operands=composed)
            maps = buffers.take(key)
            if maps is None:
                with torch.inference_mode(False):  # so that any later call may write to them
                    maps = forward.allocate(images, keep=False, raw=raw)
                    if maps.image is not None:
                        maps.image = maps.image.clone()  # it may be the caller's memory, and later calls write to it
            results, _ = forward.run(images, keep=False, maps=maps, columns=columns)
            for whole, part in zip(logits, results, strict=True):
                whole[start : start + len(part)] = part
            buffers.give(key, maps)
            start += len(images[0])
    return logits
