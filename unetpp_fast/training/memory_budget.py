"""The memory of a training step, counted from its tensors on the meta device, and the largest batch that fits."""

from __future__ import annotations

import copy
import math
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..architecture.precision import autocast_dtype
from ..common.errors import InputError
from ..models.network import Network
from ..models.tiled_prediction import HEAP
from .losses import BCEDiceLoss

ADAM = 3  # gradients and temporary tensors in a step of the optimizer, in bytes of the parameters


class _Peak(TorchDispatchMode):
    """Counts the bytes of the results of operators: `now`, and at their peak, `most`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.most = max(self.most, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key, storage.nbytes())

    def _free(self, key: int, count: int) -> None:
        self.known.discard(key)
        self.now -= count


def step_bytes(
    network: Network, size: tuple[int, ...], images: int, dtype: str = "float32", loss: nn.Module | None = None
) -> int:
    """Peak memory of a training step in bytes: maps, gradients, parameters and the state of Adam.

    Counted for the reference, which needs the most of all backends, with the network's `recompute`. On a CPU the maps count
    twice, because freed memory is not all used again. The memory of the program and its libraries is not included.

    Args:
        network: on any device; it is not changed.
        size: of the patches, one number per axis.
        images: per batch, at least 2 (batch norm).
        dtype: of the recipe; half precision adds the weights in that precision.
        loss: as for `Trainer`; default `BCEDiceLoss()`.
    """
    half = autocast_dtype(dtype)
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    kind: dict[str, Any] = {"device": "meta", "dtype": half or torch.float32}
    shapes = copy.deepcopy(network).to(**kind).train()
    shapes.backend, shapes.sync_group = "reference", ""
    loss = copy.deepcopy(loss or BCEDiceLoss()).to("meta")
    with _Peak() as peak:
        x = torch.empty(images, network.topology.in_channels, *size, **kind)
        mask = torch.empty(images, network.out_channels, *size, device="meta")
        loss(shapes.logits(x), mask).backward()
    # Weights and the two moments of Adam. The peak includes the gradients, but in half precision only half their bytes: then
    # the other half comes on top, and the weights in half precision.
    kept = parameters * (4 if half else 3)
    heap = HEAP if next(network.parameters()).device.type == "cpu" else 1
    return kept + max(heap * peak.most, ADAM * parameters)


def largest_batch(
    network: Network,
    size: tuple[int, ...],
    limit: int,
    dtype: str = "float32",
    most: int = 1024,
    loss: nn.Module | None = None,
) -> int:
    """The most images, up to `most`, whose step takes at most `limit` bytes in one process; at least 1.

    The other arguments are those of `step_bytes`.

    Raises:
        InputError: one image does not fit; the message says how much it takes.
    """
    two, three = (step_bytes(network, size, images, dtype, loss) for images in (2, 3))
    one = 2 * two - three  # batch norm may refuse a single image
    if one > limit:
        shown = "x".join(map(str, size))
        raise InputError(f"--max-memory is too small: a batch of one patch of {shown} takes {math.ceil(one / 2**20)}M")
    # A bisection that first tries the answer for images that all take the same, and its neighbours.
    guess = min(2 + (limit - two) // max(three - two, 1), most)
    first, low, high = [guess, guess + 1, guess - 1], 1, most
    while low < high:
        middle = first.pop(0) if first else (low + high + 1) // 2
        if not low < middle <= high:
            continue
        fits = step_bytes(network, size, middle, dtype, loss) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
