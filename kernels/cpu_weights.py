"""Weights as the CPU kernels take them: as they are, or packed once for kernels that read them more often.

As they are, weights are a view `[filters, filters, filters, taps, taps, K, CO]` of the caller's tensor. Packed weights are
transformed for Winograd's minimal filtering (`csrc/cpu/winograd.h`) or not, in blocks of outputs:

    Winograd   [filters, n * n, blocks, K rounded up to 4, width]        U = G w G', n = 6 for 3 taps, 5 for 2 taps
    direct     [phases, taps, blocks, K rounded up to 4, width]
    tiles      [filters, blocks, K / 32 rounded up, taps, 2, 16, width / 2, 2], bfloat16: pairs of channels side by side

`width` is two vectors of the CPU's instruction set.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

_kept: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by weight: its version, and what was packed from it


def plain(weight: Tensor, axes: int) -> Tensor:
    """`[3^axes, K, CO]`: a filter for each tap along depth."""
    return weight.unflatten(0, (3 if axes == 3 else 1, 1, 1, 3, 3))


def low(weight: Tensor, axes: int) -> Tensor:
    """`[1, 3^axes, K, CO]`, of a low source that is not up-sampled."""
    return plain(weight[0], axes)


def phased(weight: Tensor, axes: int) -> Tensor:
    """`[2^axes phases, 2^axes taps, K, CO]`: a filter for each phase and tap along depth."""
    return weight.unflatten(1, (2 if axes == 3 else 1, 1, 2, 2))


def gathered(weight: Tensor, axes: int) -> Tensor:
    """`[4^axes, K, CO]` of stride 2: a filter for each tap along depth and each lattice of every second pixel. Taps 0 and 2
    meet one lattice, taps 1 and 3 the other."""
    planes = weight.unflatten(0, (4 if axes == 3 else 1, 2, 2, 2, 2))  # depth, then tap / 2 and tap % 2 of each axis
    return planes.permute(0, 2, 4, 1, 3, 5, 6)


def strided(weight: Tensor, axes: int) -> Tensor:
    """`[3^axes, K, CO]` of stride 2: as `gathered`, with a last tap of zeros along each axis."""
    taps = F.pad(weight.unflatten(0, (3,) * axes), [0, 0, 0, 0] + [0, 1] * axes)
    return gathered(taps.flatten(0, axes - 1), axes)


def direct(weight: Tensor, axes: int) -> Tensor:
    """`[taps, K, CO]` or `[phases, taps, K, CO]` for direct sums."""
    weight = weight if weight.ndim == 4 else weight[None]
    return weight[:, None, None, :, None]


def packed(view: Tensor, way: int) -> Tensor:
    """What `torch.ops.unetpp_fast_cpu.pack` makes of a view. way: of `cpu_ops.WAYS`."""
    width = 2 * torch.ops.unetpp_fast_cpu.lanes()
    *filters, rows, columns, k, co = view.shape
    count, blocks, taps = math.prod(filters), -(-co // width), rows * columns
    if way == 2:
        out = view.new_empty(count, blocks, -(-k // 32), taps, 32, width, dtype=torch.bfloat16)
    else:
        points = {9: 36, 4: 25}[taps] if way == 1 else taps
        out = view.new_empty(count, points, blocks, -(-k // 4) * 4, width)
    torch.ops.unetpp_fast_cpu.pack(out, view, way)
    return out


def kept(weight: Tensor, form: str, pack: Callable[[Tensor], Tensor]) -> Tensor:
    """`pack(weight)`, packed again only when the weight has changed: for weights that are used more than once."""
    if weight.is_inference():  # does not count its changes
        return pack(weight)
    forms = _kept.get(weight)
    if forms is None or forms["version"] != weight._version:
        forms = _kept[weight] = {"version": weight._version}
    if form not in forms:
        forms[form] = pack(weight)
    return forms[form]
