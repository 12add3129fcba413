"""What a captured training step takes for granted of the layers that it runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

PLAIN = (bool, int, float, str, tuple, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LayerState:
    """Modules as they are now: their layers and attributes, their tensors, where these lie, and which get gradients.

    Attributes are compared as objects and, if they are numbers, strings or tuples, by value; what changes inside another
    object is not seen.
    """

    def __init__(self, roots: Iterable[nn.Module]):
        self.layers = list(dict.fromkeys(layer for root in roots for layer in root.modules()))
        self.parameters = self._unique(layer._parameters.values() for layer in self.layers)
        self.buffers = self._unique(layer._buffers.values() for layer in self.layers)
        self._attributes = [dict(layer.__dict__) for layer in self.layers]
        self._ids = [list(map(id, attributes.values())) for attributes in self._attributes]
        self._parts = [[list(part.values()) for part in _parts(layer)] for layer in self.layers]
        self._places = self._now()

    @staticmethod
    def _unique(groups: Iterable[Iterable[Tensor | None]]) -> list[Tensor]:
        return list({id(tensor): tensor for group in groups for tensor in group if tensor is not None}.values())

    def _now(self) -> list[tuple[int, bool]]:
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in (*self.parameters, *self.buffers)]

    def holds(self) -> bool:
        """Whether all of it is still so."""
        for layer, attributes, ids, parts in zip(self.layers, self._attributes, self._ids, self._parts, strict=True):
            now = layer.__dict__
            if [*map(id, now.values())] != ids and not _same(now, attributes):
                return False
            if not all(_identical(part.values(), before) for part, before in zip(_parts(layer), parts, strict=True)):
                return False
        return self._now() == self._places

    def obstacle(self) -> str:
        """Why a replay would leave out what runs for these layers beside their computations; "" if nothing does."""
        if _has_any_global_hook():
            return "there are hooks for all modules, which a replay would not call"
        for layer in self.layers:
            if isinstance(layer, (DataParallel, DistributedDataParallel)):
                return f"{type(layer).__name__} exchanges gradients by hooks, which a replay would not call"
            if any(layer.__dict__[name] for name in HOOKS):
                return f"a layer ({type(layer).__name__}) has hooks, which a replay would not call"
        if any(tensor._backward_hooks or tensor._post_accumulate_grad_hooks for tensor in self.parameters):
            return "a parameter has hooks, which a replay would not call"
        return ""


def _parts(layer: nn.Module) -> tuple[dict, dict, dict]:
    return layer._parameters, layer._buffers, layer._modules


def _identical(now: Iterable, before: Sequence) -> bool:
    return [*map(id, now)] == [*map(id, before)]


def _same(now: dict[str, Any], before: dict[str, Any]) -> bool:
    return now.keys() == before.keys() and all(_equal(value, before[name]) for name, value in now.items())


def _equal(one: Any, other: Any) -> bool:
    """Whether both are one object or equal numbers, strings or tuples; tensors are not compared, as that would wait."""
    if one is other:
        return True
    if type(one) is not type(other) or not isinstance(one, PLAIN):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one == other
