"""Weights as the CPU kernels take them: transformed for Winograd's minimal filtering or as they are, in blocks of outputs.

    Winograd   [filters, n * n, blocks, K rounded up to 4, width]        U = G w G', n = 6 for 3 taps, 5 for 2 taps
    direct     [phases, taps, blocks, K rounded up to 4, width]

`width` is two vectors of the CPU's instruction set. The transforms of inputs and outputs are in `csrc/cpu/winograd.h`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

POINTS = {3: (0.0, 0.5**0.5, -(0.5**0.5), 2.0**0.5, -(2.0**0.5)), 2: (0.5, -0.5, 1.2, -1.2)}  # and infinity, by taps
_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by weight: its version, and what was packed from it


@lru_cache
def filter_transform(taps: int) -> Tensor:
    """`[n * n, taps * taps]`, float64: G applied along both axes of a plane.

    Row j of G is (1, p, p², ..) / prod over the other points q of (p - q) for a finite point p, (0, .., 0, 1) for infinity.
    """
    points = torch.tensor(POINTS[taps], dtype=torch.float64)
    rows = [points**tap for tap in range(taps)]
    others = points[:, None] - points[None, :] + torch.eye(len(points), dtype=torch.float64)
    g = torch.stack(rows, dim=1) / others.prod(dim=1, keepdim=True)
    last = torch.zeros(1, taps, dtype=torch.float64)
    last[0, -1] = 1
    g = torch.cat((g, last))
    return torch.kron(g, g)


def _blocks(filters: Tensor, width: int) -> Tensor:
    """`[..., K, CO]` as `[..., blocks, K rounded up to 4, width]`, contiguous."""
    k, co = filters.shape[-2:]
    filters = F.pad(filters, (0, -co % width, 0, -k % 4))
    return filters.unflatten(-1, (-1, width)).transpose(-3, -2).contiguous()


def _transformed(blocks: Tensor, taps: int) -> Tensor:
    """Blocks `[count, taps * taps, ..]` as `[count, n * n, ..]`.

    Whole blocks: the product of matrices with fewer columns has other bits with another number of threads.
    """
    matrix = filter_transform(taps).to(blocks.dtype)
    return torch.matmul(matrix, blocks.flatten(2)).unflatten(2, blocks.shape[2:])


def pack_plain(weight: Tensor, axes: int, width: int) -> Tensor:
    """`[3^axes, K, CO]` for Winograd, a filter for each tap along depth."""
    depth = 3 if axes == 3 else 1
    return _transformed(_blocks(weight.unflatten(0, (depth, 9)), width), 3)


def pack_low(weight: Tensor, axes: int, width: int) -> Tensor:
    """`[1, 3^axes, K, CO]`, of a low source that is not up-sampled, for Winograd."""
    return pack_plain(weight[0], axes, width)


def pack_phased(weight: Tensor, axes: int, width: int) -> Tensor:
    """`[2^axes phases, 2^axes taps, K, CO]` for Winograd, a filter for each phase and tap along depth."""
    depth = 2 if axes == 3 else 1
    filters = weight.unflatten(1, (depth, 4)).flatten(0, 1)
    return _transformed(_blocks(filters, width), 2)


def pack_gathered(weight: Tensor, axes: int, width: int) -> Tensor:
    """`[4^axes, K, CO]` of stride 2 for Winograd: taps 1 and 3 meet the lattice of even pixels, taps 0 and 2 that of odd."""
    depth = 4 if axes == 3 else 1
    planes = weight.unflatten(0, (depth, 4, 4))
    lattices = torch.tensor([[1, 3], [0, 2]])
    filters = planes[:, lattices][:, :, :, lattices]  # [depth, py, ty, px, tx, K, CO]
    filters = filters.permute(0, 1, 3, 2, 4, 5, 6).reshape(depth * 4, 4, *weight.shape[1:])
    return _transformed(_blocks(filters, width), 2)


def pack_direct(weight: Tensor, width: int) -> Tensor:
    """`[..., taps, K, CO]` for direct sums."""
    return _blocks(weight, width)


def kept(weight: Tensor, form: str, pack) -> Tensor:
    """`pack(weight)`, packed again only when the weight has changed: for weights that are used more than once."""
    if weight.is_inference():  # does not count its changes
        return pack(weight)
    forms = _kept.get(weight)
    if forms is None or forms["version"] != weight._version:
        forms = _kept[weight] = {"version": weight._version}
    if form not in forms:
        forms[form] = pack(weight)
    return forms[form]
