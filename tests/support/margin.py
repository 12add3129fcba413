"""How near a network is, for an input, to a choice that rounding may make the other way."""

from __future__ import annotations

import math

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

MARGIN = 4e-6  # of the largest value; errors are about 1e-6 of it


class Margin(TorchDispatchMode):
    """The least distance, as a share of the largest value, of an activation's input from zero and of a window's maximum from
    its next: where it is within rounding, so is the choice that a gradient depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.least = math.inf

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith(("relu", "leaky_relu")):
            self.note(args[0].abs(), args[0])
        elif name.startswith("max_pool"):
            windows = args[0]
            for axis in range(2, windows.ndim):
                windows = windows.unfold(axis, 2, 2)
            first, second = windows.flatten(args[0].ndim).topk(2).values.unbind(-1)
            self.note((first - second)[first != 0], first)
        return func(*args, **(kwargs or {}))

    def note(self, distances: Tensor, values: Tensor) -> None:
        if distances.numel():
            self.least = min(self.least, (distances.min() / values.abs().max()).item())
