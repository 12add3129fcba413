"""The forward pass in plain PyTorch: any device, any dtype, differentiable, exportable. The oracle of other backends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..architecture.network_spec import NetworkSpec
from .call import Inputs, inputs_of


def forward(network: NetworkSpec, x: Inputs) -> list[Tensor]:
    """Logits `[N, out_channels, *S]` of each head, shallowest first, for `x` `[N, in_channels, *S]`, or for the given maps
    of an encoder."""
    maps, topology = node_maps(network, x), network.topology
    return [network.heads[topology[0, column].name](maps[0, column]) for column in topology.heads]


def node_maps(network: NetworkSpec, x: Inputs) -> dict[tuple[int, int], Tensor]:
    """The output `[N, width, *S / 2^i]` of every node (i, j), for `x` as in `forward`."""
    topology, inputs = network.topology, inputs_of(x)
    pool = F.max_pool2d if topology.spatial_dims == 2 else F.max_pool3d
    strided = network.options["downsample"] == "stride"  # the first convolution of a level halves the map
    maps: dict[tuple[int, int], Tensor] = {}
    if topology.given:
        first = sorted(node.position for node in topology.nodes if not node.column)
        maps = dict(zip(first, inputs, strict=True))
    for node in topology.nodes:
        if node.position in maps:
            continue
        if node.column:
            prefix = [maps[node.level, column] for column in node.prefix]
            low = maps[node.low]
        else:
            above = maps[node.level - 1, 0] if node.level else inputs[0]
            by = topology.stride(node.level) if topology.strides else 2
            prefix = [pool(above, by) if node.level and not strided else above]
            low = None
        maps[node.position] = _node(network.nodes[node.name], prefix, low, network.recompute and torch.is_grad_enabled())
    return maps


def _node(module: nn.Module, prefix: list[Tensor], low: Tensor | None, recompute: bool) -> Tensor:
    if not recompute:
        return module(prefix, low)
    source = low if low is not None else prefix[0]
    if source.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("PyTorch reads random states back to recompute a node, which no CUDA graph can hold")
    return checkpoint(module, prefix, low, use_reentrant=False, context_fn=lambda: (nullcontext(), _buffers_kept(module)))


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Inside, norms update copies of their running statistics, which already include this pass."""
    before = [(part, dict(part._buffers)) for part in module.modules()]
    for part, buffers in before:
        part._buffers.update({name: None if value is None else value.clone() for name, value in buffers.items()})
    try:
        yield
    finally:
        for part, buffers in before:
            part._buffers.update(buffers)
