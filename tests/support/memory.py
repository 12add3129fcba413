"""Bytes that a pass keeps."""

from __future__ import annotations

import torch

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
