"""What a captured training step takes for granted of the layers that it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.parallel import DataParallel, DistributedDataParallel

PLAIN = (bool, int, float, str, tuple, type(None))
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LayerState:
    """Modules as they are now: their layers and attributes, their tensors, where these lie, and which get gradients.

    Attributes are compared as objects and, if they are numbers, strings or tuples, by value; what changes inside another
    object is not seen. A comparison runs at every step, so it is a few passes over flat lists.
    """

    def __init__(self, roots: Iterable[nn.Module]):
        self.layers = list(dict.fromkeys(layer for root in roots for layer in root.modules()))
        self.parameters = _unique(layer._parameters for layer in self.layers)
        self.buffers = _unique(layer._buffers for layer in self.layers)
        self._attributes = [layer.__dict__ for layer in self.layers]
        self._parts = [part for layer in self.layers for part in (layer._parameters, layer._buffers, layer._modules)]
        self._hooks = [layer.__dict__[name] for layer in self.layers for name in HOOKS]
        self._held = [dict(part) for part in self._parts]  # so that no other object gets the identity of one of these
        self._part_ids, self._types, self._places = _ids(self._parts), self._kinds(), self._now()
        self._note_attributes()

    def _note_attributes(self) -> None:
        self._before = [dict(attributes) for attributes in self._attributes]
        self._ids = _ids(self._attributes)

    def _kinds(self) -> list[type]:
        return [*map(type, self.layers)]

    def _now(self) -> list[tuple[int, bool]]:
        return [(tensor.data_ptr(), tensor.requires_grad) for tensor in (*self.parameters, *self.buffers)]

    def holds(self) -> bool:
        """Whether all of it is still so."""
        if _ids(self._attributes) != self._ids:
            if not all(map(_same, self._attributes, self._before)):
                return False
            self._note_attributes()  # equal values in new objects
        return _ids(self._parts) == self._part_ids and self._kinds() == self._types and self._now() == self._places

    def obstacle(self) -> str:
        """Why a replay would leave out what runs for these layers beside their computations; "" if nothing does."""
        if _has_any_global_hook():
            return "there are hooks for all modules, which a replay would not call"
        for kind in (DataParallel, DistributedDataParallel):
            if kind in self._types:
                return f"{kind.__name__} exchanges gradients by hooks, which a replay would not call"
        if any(self._hooks):
            layer = next(layer for layer in self.layers if any(layer.__dict__[name] for name in HOOKS))
            return f"a layer ({type(layer).__name__}) has hooks, which a replay would not call"
        if any(tensor._backward_hooks or tensor._post_accumulate_grad_hooks for tensor in self.parameters):
            return "a parameter has hooks, which a replay would not call"
        return ""


def _unique(groups: Iterable[Mapping[str, Tensor | None]]) -> list[Tensor]:
    return list({id(tensor): tensor for group in groups for tensor in group.values() if tensor is not None}.values())


def _ids(groups: Iterable[dict[str, Any]]) -> list[int]:
    return [*map(id, chain.from_iterable(map(dict.values, groups)))]


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
