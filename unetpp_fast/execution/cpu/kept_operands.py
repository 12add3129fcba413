"""The composed weights of networks that run on a CPU without `optimize`, kept until their values change."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..plan.operands import Modes, all_operands
from .inference import Composed


@dataclass(frozen=True)
class Kept:
    """Composed weights, the modes of the norms, and a copy of the values that they were composed from."""

    values: dict[str, Tensor]
    modes: Modes
    composed: Composed

    def are_of(self, tensors: Mapping[str, Tensor]) -> bool:
        return self.values.keys() == tensors.keys() and all(
            value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]) for name, value in self.values.items()
        )


_kept: dict[tuple, Kept] = {}
_lock = threading.Lock()


def of_call(call: Call) -> Kept:
    """The composed weights of a network as they are now, composed again only when they changed.

    Every call compares all values with those that were composed: no version counter tells of an edit through `.data` or of
    one by another library, and reading the weights takes little beside a pass.
    """
    tensors, structure = call.tensors(), call.structure
    first = next(iter(call.network.nodes.values())).conv1.weight  # shared by a network and its pruned forms
    key = (id(first), structure.handle, call.dtype)
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), _lock:
        kept = _kept.get(key)
        if kept is None or not kept.are_of(tensors):
            if kept is None:
                weakref.finalize(first, _kept.pop, key, None)
            copies = {name: value.clone() for name, value in tensors.items()}
            modes = structure.modes("0" * len(structure.norms), keep=False)
            composed = all_operands(structure.plan, copies, modes, call.dtype)
            kept = _kept[key] = Kept(copies, modes, composed)
    return kept
