"""Bytes that a pass keeps, and that it has at most."""

from __future__ import annotations

import torch
from support.launches import BODIES
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import unetpp_fast as uf


def kept_bytes(run, model: uf.Network, x: torch.Tensor) -> int:
    """Bytes of the distinct tensors that autograd keeps for a backward pass, parameters and the input apart."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (x, *model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run(model, x)
    assert outputs[0].grad_fn is not None
    return sum(kept.values())


class Peak(TorchDispatchMode):
    """Counts the bytes of live tensors that were made inside it; `most` is their maximum.

    Inside the fused operators too; what an operator of PyTorch takes for itself while it runs is not seen. Under a
    `FakeTensorMode` nothing is computed, and sizes may be those of a GPU.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "unetpp_fast":
            with self:
                return BODIES[func.overloadpacket.__name__]._init_fn(*args, **kwargs)
        given = {value.untyped_storage()._cdata for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)}
        result = func(*args, **kwargs)
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in given:
                storage = value.untyped_storage()
                self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return result


def peak_of_a_step(run, model: uf.Network, x: torch.Tensor) -> int:
    """The most bytes that are alive at once in a forward and a backward pass of `run`, parameters and input apart."""
    model.zero_grad()
    with Peak() as peak:
        outputs = run(model, x)
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return peak.most
