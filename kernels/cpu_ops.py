"""The ops of `naive.py` on a CPU, under the same names, by the kernels of `csrc/cpu`, for float32 and bfloat16 maps; other
precisions run in `naive.py`. Sums, and what a reader computes of a map, are float32 in both.

A 3-tap convolution is computed by Winograd's minimal filtering, F(4x4, 3x3), its low source and the gradient of a low source
by F(4x4, 2x2) for each phase; maps of a few tiles, and one tap, by direct sums. Where the CPU has matrix tiles (AMX),
bfloat16 maps are convolved in those, with products of bfloat16. The library registers `torch.ops.unetpp_fast_cpu`;
`unetpp_fast.execution.fused.libraries` loads it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import cpu_weights, naive
from .naive import Affine, Averages, border_sums, norm_table

__all__ = [
    "act_backward",
    "border_sums",
    "conv",
    "conv_pair",
    "conv_wgrad",
    "head",
    "head_backward",
    "norm_backward",
    "norm_table",
    "pool",
    "pool_backward",
]

WAYS = {"direct": 0, "winograd": 1, "few": 1, "tiles": 2}  # of the library, by kernel
LINEAR = {None: 0, False: 1, True: 2}  # of the library, by `linear`
ACTIVATIONS = {False: 0, True: 1, "relu6": 2, "silu": 3, "hardswish": 4}  # of the library, by `act`
MIN_TILES = 6  # that share transformed weights, for Winograd; with fewer, the transform costs more than it saves
TILES = ("cpu",)  # whose matrix tiles are used
FEW_TILES = 1024  # of all images, up to which a convolution of many channels transforms its weights as it reads them
MANY_WEIGHTS = 2**13  # pairs of channels that are many
FEW_PRODUCTS = 2**16  # pairs of channels times tiles of an image, up to which bare sums, as data gradients, are direct
LEAST_PAIRED = 2**23  # bytes of a map that makes the two convolutions of a node run strip by strip
PAIRED = 2**23  # bytes of such a strip
CHUNK = 4096  # pixels of a partial sum
SCRATCH = 2**21  # values of transformed tiles that a weight gradient holds at a time, so that they stay in the cache
MIN_BATCH = 128  # tiles that it holds at least: the last transform of their sums costs as much as twenty


def _supports(*maps: Tensor | None) -> bool:
    dtypes = {x.dtype for x in maps if x is not None}
    return len(dtypes) == 1 and dtypes <= {torch.float32, torch.bfloat16}


@lru_cache
def matrix_tiles() -> str:
    """What multiplies matrix tiles: "cpu", or "plain" sums, for tests, where the library has no code for such CPUs; "" if
    nothing does."""
    return ("", "plain", "cpu")[torch.ops.unetpp_fast_cpu.matrix_tiles()]


def kernel_for(
    out: Tensor, inputs: int, axes: int, taps: int, stride: int, phased: bool, low: bool, bare: bool = False
) -> str:
    """What computes a convolution of `inputs` channels into `out`: "winograd" with packed weights, "few" with weights that
    are transformed as they are read, "tiles" in matrix tiles, or "direct". bare: it is nothing but sums, as data gradients
    are; narrow ones of small maps are direct, as errors of transforms add up on the way to an encoder's parameters."""
    halves = taps in (3, 4) and stride == 2 and not phased and not low
    known = (taps, stride, phased) in ((3, 1, False), (3, 2, True)) or halves
    tiles = math.ceil(out.shape[2] / 4) * math.ceil(out.shape[3] / 4)
    if not known:
        return "direct"
    if out.dtype == torch.bfloat16 and matrix_tiles() in TILES:
        return "tiles"
    if axes == 2 and inputs * out.shape[-1] >= MANY_WEIGHTS and MIN_TILES <= tiles * out.shape[0] <= FEW_TILES:
        return "few"
    narrow = bare and axes == 2 and out.dtype == torch.float32 and (taps, stride) == (3, 1)
    if narrow and inputs * out.shape[-1] * tiles <= FEW_PRODUCTS:
        return "direct"
    return "winograd" if tiles >= MIN_TILES else "direct"


def conv(
    out: Tensor,
    a: Tensor,
    wa: Tensor,
    *,
    axes: int,
    taps: int = 3,
    stride: int = 1,
    phased: bool = False,
    affine_a: Affine | None = None,
    b: Tensor | None = None,
    wb: Tensor | None = None,
    affine_b: Affine | None = None,
    linear: bool | None = None,
    slope: float = 0.0,
    plain: int = 0,
    bias: Tensor | None = None,
    border: Tensor | None = None,
    act: bool | str = False,
    add: bool = False,
    stats: bool = False,
) -> Tensor | None:
    """See `naive.conv`. Statistics come as `[N, T, 3, CO]`, one of T parts per block of pixels."""
    if not _supports(out, a, b):
        return naive.conv(
            out, a, wa, axes=axes, taps=taps, stride=stride, phased=phased, affine_a=affine_a, b=b, wb=wb, affine_b=affine_b,
            linear=linear, slope=slope, plain=plain, bias=bias, border=border, act=act, add=add, stats=stats,
        )  # fmt: skip
    inputs, low_inputs = a.shape[-1], 0 if b is None else b.shape[-1]
    bare = b is None and bias is None and not act and not stats  # data gradients, and forward passes under frozen norms
    kernel = kernel_for(out, inputs + low_inputs, axes, taps, stride, phased, b is not None, bare)
    form = "gathered" if taps == 4 else "plain"
    if kernel != "direct" and (taps, stride, phased) == (3, 2, False):
        taps, form = 4, "strided"  # of which the kernels know four taps
    ua = _weights(wa, form, axes, kernel)
    ub = None if wb is None else _weights(wb, "phased" if phased else "low", axes, kernel)
    partial = None
    if stats:
        parts = torch.ops.unetpp_fast_cpu.conv_parts(out, inputs, low_inputs, phased, WAYS[kernel])
        partial = out.new_empty(out.shape[0], parts, 3, out.shape[-1], dtype=torch.float32)
    torch.ops.unetpp_fast_cpu.conv(
        out, a, ua, *(affine_a or (None, None)), b, ub, *(affine_b or (None, None)), bias, border, partial,
        axes, taps, stride, phased, LINEAR[linear], WAYS[kernel], float(slope), plain, ACTIVATIONS[act], add,
    )  # fmt: skip
    return partial


def pair_rows(size: Sequence[int], channels: int, itemsize: int) -> int:
    """Rows between the two convolutions of a node that `conv_pair` holds, for a map `[H, W]`; 0 where two `conv` serve."""
    height, row = size[0], size[1] * channels * itemsize
    if height * row < LEAST_PAIRED:
        return 0
    return min(-(-height // 8) * 8, max(16, PAIRED // row // 8 * 8)) + 9


def conv_pair(
    out: Tensor,
    mid: Tensor,
    a: Tensor,
    wa: Tensor,
    second: Tensor,
    *,
    phased: bool = False,
    b: Tensor | None = None,
    wb: Tensor | None = None,
    linear: bool | None = None,
    bias: Tensor | None = None,
    border: Tensor | None = None,
    second_bias: Tensor | None = None,
    slope: float = 0.0,
) -> None:
    """`out = act(conv(act(conv(a, wa) + conv(b, wb) + bias + border), second) + second_bias)` in 2D, as two `conv`.

    Of the map in between only `mid`, `[1, 1, pair_rows, W, C]`, exists, strip by strip. All weights `[9, K, CO]`, `wb` as in
    `conv`. `out` may be channels that `a` reads, if no pixel of them is read after it was written.
    """
    kernels = (kernel_for(out, x.shape[-1], 2, 3, 1, False, False) for x in (a, mid))  # rows of mid are not its size
    first, last = ("winograd" if kernel == "direct" else kernel for kernel in kernels)
    ua, u2 = _weights(wa, "plain", 2, first), _weights(second, "plain", 2, last)
    ub = None if wb is None else _weights(wb, "phased" if phased else "low", 2, first)
    torch.ops.unetpp_fast_cpu.conv_pair(
        out, mid, a, ua, b, ub, bias, border, u2, second_bias, phased, LINEAR[linear], float(slope)
    )


def _weights(weight: Tensor, form: str, axes: int, kernel: str) -> Tensor:
    """The weights as `kernel` takes them. form: of `cpu_weights`."""
    name = "direct" if kernel == "direct" else form
    view = getattr(cpu_weights, name)
    if kernel == "few":
        return view(weight.float(), axes)
    return cpu_weights.kept(
        weight, f"{kernel} {name}", lambda weight: cpu_weights.packed(view(weight.float(), axes), WAYS[kernel])
    )


def conv_wgrad(
    a: Tensor,
    dy: Tensor,
    *,
    axes: int,
    phased: bool = False,
    affine: Affine | None = None,
    slope: float = 0.0,
    plain: int = 0,
) -> Tensor:
    """See `naive.conv_wgrad`. Sums run in the transformed domain, or in matrix tiles of bfloat16 maps; in both in an order
    that does not depend on threads."""
    if not _supports(a, dy):
        return naive.conv_wgrad(a, dy, axes=axes, phased=phased, affine=affine, slope=slope, plain=plain)
    taps, k, co, phases = 2 if phased else 3, a.shape[-1], dy.shape[-1], 2**axes if phased else 1
    tiles = a.dtype == torch.bfloat16 and matrix_tiles() in TILES
    if tiles:
        size = torch.ops.unetpp_fast_cpu.wgrad_scratch(a, dy, axes, phased)
    else:
        lanes, points = torch.ops.unetpp_fast_cpu.lanes(), (taps + 3) ** 2
        size = max(SCRATCH, MIN_BATCH * points * (-(-k // lanes) * lanes + -(-co // lanes) * lanes))
    scratch = a.new_empty(size, dtype=torch.float32)
    # Without phases in the layout of a parameter, [CO, K, 3..]; with phases they are sums of weights first.
    order = (phases, taps**axes, k, co) if phased else (phases, co, k, taps**axes)
    result = a.new_empty(order, dtype=torch.float32)
    result = result if phased else result.permute(0, 3, 2, 1)
    torch.ops.unetpp_fast_cpu.conv_wgrad(
        result,
        scratch,
        a,
        *(affine or (None, None)),
        dy,
        axes,
        phased,
        WAYS["tiles" if tiles else "winograd"],
        float(slope),
        plain,
    )
    return result


def pool(out: Tensor, x: Tensor, *, axes: int, affine: Affine | None = None, slope: float = 0.0) -> None:
    """See `naive.pool`."""
    if not _supports(out, x):
        return naive.pool(out, x, axes=axes, affine=affine, slope=slope)
    return torch.ops.unetpp_fast_cpu.pool(out, x, *(affine or (None, None)), axes, float(slope))


def pool_backward(
    gx: Tensor, g: Tensor, x: Tensor, *, axes: int, affine: Affine | None = None, slope: float = 0.0, add: bool = False
) -> None:
    """See `naive.pool_backward`."""
    if not _supports(gx, g, x):
        return naive.pool_backward(gx, g, x, axes=axes, affine=affine, slope=slope, add=add)
    return torch.ops.unetpp_fast_cpu.pool_backward(gx, g, x, *(affine or (None, None)), axes, float(slope), add)


def head(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, affine: Affine | None = None, slope: float = 0.0) -> None:
    """See `naive.head`."""
    if not _supports(out, x):
        return naive.head(out, x, weight, bias, affine=affine, slope=slope)
    rest = affine or (None, None)
    return torch.ops.unetpp_fast_cpu.head(out, x, *rest, weight.float().contiguous(), bias.contiguous(), float(slope), CHUNK)


def head_backward(
    gx: Tensor, dy: Tensor, x: Tensor, weight: Tensor, *, affine: Affine | None = None, slope: float = 0.0, add: bool = False
) -> tuple[Tensor, Tensor]:
    """See `naive.head_backward`."""
    if not _supports(gx, dy, x):
        return naive.head_backward(gx, dy, x, weight, affine=affine, slope=slope, add=add)
    classes, channels = weight.shape
    sums = x.new_zeros(x.shape[0], _chunks(x), classes, channels + 1, dtype=torch.float32)
    torch.ops.unetpp_fast_cpu.head_backward(
        gx, sums, dy.contiguous(), x, *(affine or (None, None)), weight.float().contiguous(), float(slope), add, CHUNK
    )
    total = sums.double().sum((0, 1)).float()
    return total[:, :channels], total[:, channels]


def norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: Affine,
    slope: float,
    frozen: bool,
    averages: Averages | None = None,
) -> tuple[Tensor, Tensor]:
    """See `naive.norm_backward`."""
    if not _supports(g, x):
        return naive.norm_backward(g, x, mean, inverse, affine, slope, frozen, averages)
    sums = x.new_zeros(x.shape[0], _chunks(x), 2, x.shape[-1], dtype=torch.float32)
    torch.ops.unetpp_fast_cpu.norm_sums(sums, g, x, mean, inverse, *affine, float(slope), frozen, CHUNK)
    per_image = sums.double().sum(1)
    total = per_image.sum(0)
    if not frozen:
        pixels = x.shape[1:4].numel()
        if averages is not None:
            means = averages(total.float(), x.shape[0] * pixels)[None]
        elif mean.shape[0] == x.shape[0] and mean.shape[0] > 1:
            means = per_image / pixels
        else:
            means = total[None] / max(1, x.shape[0] * pixels)
        torch.ops.unetpp_fast_cpu.norm_apply(g, x, mean, inverse, *affine, means.float().contiguous(), float(slope), CHUNK)
    return total[1].float(), total[0].float()


def act_backward(g: Tensor, out: Tensor, slope: float) -> Tensor:
    """See `naive.act_backward`."""
    if not _supports(g, out):
        return naive.act_backward(g, out, slope)
    sums = out.new_zeros(out.shape[0], _chunks(out), out.shape[-1], dtype=torch.float32)
    torch.ops.unetpp_fast_cpu.act_backward(sums, g, out, float(slope), CHUNK)
    return sums.double().sum((0, 1)).float()


def _chunks(x: Tensor) -> int:
    """Partial sums of an image."""
    return -(-x.shape[1:4].numel() // CHUNK)
