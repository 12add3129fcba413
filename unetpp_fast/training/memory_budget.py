"""How many images a training step may hold within some memory: a step is run on shapes alone, and its tensors counted."""

from __future__ import annotations

import copy
import math
import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..architecture.precision import autocast_dtype
from ..common.errors import InputError
from ..execution import reference
from ..models.network import Network
from ..models.tiled_prediction import HEAP
from .losses import BCEDiceLoss

ADAM = 3  # times the bytes of the parameters, in the step of the optimizer: gradients and what it works on


class _Peak(TorchDispatchMode):
    """The most bytes that the results of operators took at one time."""

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
    """Bytes of the tensors of a training step at its peak: maps, gradients, parameters and the state of Adam.

    Counted for the reference, which needs most of the backends, with `network.recompute` as it is; on a CPU the maps count
    twice, as not all that was freed is used again. What the program and its libraries take for themselves comes on top.

    Args:
        size: of the patches, one number an axis.
        images: in the batch, at least 2 (batch norm).
        dtype: of the recipe; with half precision the weights are counted once more, in that precision.
        loss: as for `Trainer`; default `BCEDiceLoss()`.
    """
    half = autocast_dtype(dtype)
    parameters = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    kind = {"device": "meta", "dtype": half or torch.float32}
    shapes = copy.deepcopy(network).to(**kind).train()
    loss = copy.deepcopy(loss or BCEDiceLoss()).to("meta")
    with _Peak() as peak:
        x = torch.empty(images, network.topology.in_channels, *size, **kind)
        mask = torch.empty(images, network.out_channels, *size, device="meta")
        loss(reference.forward(shapes, x), mask).backward()
    # Weights and the two means of Adam; their gradients are in the peak, where it is half precision by half. Beside those
    # come the weights in half precision.
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
    """The most images, up to `most`, of which one process holds a step within `limit` bytes; at least 1.

    The other arguments are those of `step_bytes`.

    Raises:
        InputError: not even one fits; the message says how much it takes.
    """
    two, three = (step_bytes(network, size, images, dtype, loss) for images in (2, 3))
    one = 2 * two - three  # batch norm may refuse a single image
    if one > limit:
        shown = "x".join(map(str, size))
        raise InputError(f"--max-memory is too small: a batch of one patch of {shown} takes {math.ceil(one / 2**20)}M")
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        fits = step_bytes(network, size, middle, dtype, loss) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
