"""The forward pass in plain PyTorch: any device, any dtype, differentiable, exportable. The oracle of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from .models import Network


def forward(network: Network, x: Tensor) -> list[Tensor]:
    """Logits `[N, out_channels, *S]` of each head, shallowest first, for `x` `[N, in_channels, *S]`."""
    topology = network.topology
    pool = F.max_pool2d if topology.spatial_dims == 2 else F.max_pool3d
    maps: dict[tuple[int, int], Tensor] = {}
    for node in topology.nodes:
        if node.column:
            prefix = [maps[node.level, column] for column in node.prefix]
            low = maps[node.low]
        else:
            prefix = [pool(maps[node.level - 1, 0], 2) if node.level else x]
            low = None
        maps[node.position] = network.nodes[node.name](prefix, low)
    return [network.heads[topology[0, column].name](maps[0, column]) for column in topology.heads]
