"""The 1x1 convolution that ends a network: a raw channels-last map in, channels-first class scores out, and back.

Both are bound by memory. Few classes are summed without tensor cores, whose tiles would be padded to 16 classes. With
tensor cores, half-precision maps are used unchanged, and single-precision weights are split into two float16 or three
bfloat16 summands, so that only the result is rounded to half; float32 maps are multiplied by `PRODUCTS`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from .jit import kernel
from .maps import (
    PRODUCTS,
    Tile,
    affine_arguments,
    ceil_div,
    check_same,
    device_of,
    load_activated,
    load_row,
    map_arguments,
    power_of_two,
)
from .naive import MOST_CLASSES, Affine

FEW_CLASSES, FEW_CHANNELS = 8, 512  # up to these, without tensor cores
BACKWARD = Tile(elements=2048, programs=1024)


@triton.jit
def _dot(a, b, acc, SUMMANDS: tl.constexpr):
    """acc + a b, with b as a sum of SUMMANDS matrices in the precision of a; in one product if 0."""
    if SUMMANDS:
        for _ in tl.static_range(SUMMANDS):
            part = b.to(a.dtype)
            acc = tl.dot(a, part, acc)
            b -= part.to(tl.float32)
    else:
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRODUCTS)
    return acc


@kernel(aligned=("pixels",))
def _head_few_kernel(
    out_ptr, x_ptr, x_stride_n, x_stride_p, weight_ptr, bias_ptr, scale_ptr, scale_stride, shift_ptr, shift_stride,
    pixels, tiles, K, CLASSES: tl.constexpr, AFFINE: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[n, m, p] = bias[m] + sum_k act(scale x[n, p, k] + shift) weight[m, k], with all of K in one tile."""
    n, first = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    k = tl.arange(0, BLOCK_K)
    mask = (p < pixels - first)[:, None] & (k < K)[None, :]
    scale, shift = 1.0, 0.0
    if AFFINE:
        scale, shift = load_row(scale_ptr, scale_stride, n, k, K), load_row(shift_ptr, shift_stride, n, k, K)
    x_ptr += n * x_stride_n + first * x_stride_p + p[:, None] * x_stride_p + k[None, :]
    x = load_activated(x_ptr, mask, scale, shift, AFFINE, SLOPE).to(tl.float32)
    for m in tl.static_range(CLASSES):
        weight = tl.load(weight_ptr + m * K + k, mask=k < K, other=0.0).to(tl.float32)
        value = tl.sum(x * weight[None, :], axis=1) + tl.load(bias_ptr + m).to(tl.float32)
        where = out_ptr + (n * CLASSES + m) * pixels + first + p
        tl.store(where, value.to(out_ptr.dtype.element_ty), mask=p < pixels - first)


@kernel(aligned=("pixels",))
def _head_kernel(
    out_ptr, x_ptr, x_stride_n, x_stride_p, weight_ptr, bias_ptr, scale_ptr, scale_stride, shift_ptr, shift_stride,
    pixels, tiles, K, CLASSES: tl.constexpr, AFFINE: tl.constexpr, SLOPE: tl.constexpr, SUMMANDS: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """As _head_few_kernel, for more classes or channels: STEPS products [BLOCK_P, BLOCK_K] [BLOCK_K, BLOCK_M]."""
    n, first = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    p = tl.arange(0, BLOCK_P)
    m = tl.arange(0, BLOCK_M)
    inside = p < pixels - first
    acc = tl.zeros((BLOCK_P, BLOCK_M), tl.float32)
    for step in range(STEPS):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = inside[:, None] & (k < K)[None, :]
        scale, shift = 1.0, 0.0
        if AFFINE:
            scale, shift = load_row(scale_ptr, scale_stride, n, k, K), load_row(shift_ptr, shift_stride, n, k, K)
        where = x_ptr + n * x_stride_n + first * x_stride_p + p[:, None] * x_stride_p + k[None, :]
        x = load_activated(where, mask, scale, shift, AFFINE, SLOPE)
        weight_mask = (k < K)[:, None] & (m < CLASSES)[None, :]
        weight = tl.load(weight_ptr + m[None, :] * K + k[:, None], mask=weight_mask, other=0.0)
        acc = _dot(x, weight, acc, SUMMANDS)
    acc += tl.load(bias_ptr + m, mask=m < CLASSES, other=0.0).to(tl.float32)[None, :]
    where = out_ptr + n * CLASSES * pixels + first + m.to(tl.int64)[None, :] * pixels + p[:, None]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (m < CLASSES)[None, :])


@kernel(aligned=("pixels",))
def _head_backward_kernel(
    gx_ptr, gx_stride_n, gx_stride_p, dy_ptr, x_ptr, x_stride_n, x_stride_p, weight_ptr,
    scale_ptr, scale_stride, shift_ptr, shift_stride, sums_ptr, pixels, chunks, K,
    CLASSES: tl.constexpr, AFFINE: tl.constexpr, SLOPE: tl.constexpr, ADD: tl.constexpr, HALF: tl.constexpr,
    SUMMANDS: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """gx[p, k] (+)= sum_m dy[m, p] weight[m, k], and over the pixels of a chunk

        sums[n, chunk] = (sum_p dy[m, p] act(scale x[p, k] + shift) for all m and k, sum_p dy[m, p] for all m)

    HALF: dy and x share a half precision, in which they are multiplied; otherwise in float32.
    """
    n, chunk = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    m = tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    weight_mask = (m < CLASSES)[:, None] & (k < K)[None, :]
    weight = tl.load(weight_ptr + m[:, None] * K + k[None, :], mask=weight_mask, other=0.0)
    scale, shift = 1.0, 0.0
    if AFFINE:
        scale, shift = load_row(scale_ptr, scale_stride, n, k, K), load_row(shift_ptr, shift_stride, n, k, K)
    weight_sum = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    bias_sum = tl.zeros((BLOCK_M,), tl.float32)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        inside = p < pixels - first
        dy_where = dy_ptr + n * CLASSES * pixels + first + m.to(tl.int64)[:, None] * pixels + p[None, :]
        dy = tl.load(dy_where, mask=(m < CLASSES)[:, None] & inside[None, :], other=0.0)
        bias_sum += tl.sum(dy.to(tl.float32), axis=1)
        mask = inside[:, None] & (k < K)[None, :]
        x_where = x_ptr + n * x_stride_n + first * x_stride_p + p[:, None] * x_stride_p + k[None, :]
        x = load_activated(x_where, mask, scale, shift, AFFINE, SLOPE)
        if not HALF:
            dy, x = dy.to(tl.float32), x.to(tl.float32)
        weight_sum = _dot(dy, x, weight_sum, 0)
        part = _dot(tl.trans(dy), weight, tl.zeros((BLOCK_P, BLOCK_K), tl.float32), SUMMANDS)
        where = gx_ptr + n * gx_stride_n + first * gx_stride_p + p[:, None] * gx_stride_p + k[None, :]
        if ADD:
            part += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        tl.store(where, part.to(gx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * CLASSES * (K + 1)
    tl.store(sums_ptr + m[:, None] * K + k[None, :], weight_sum, mask=weight_mask)
    if tl.program_id(1) == 0:
        tl.store(sums_ptr + CLASSES * K + m, bias_sum, mask=m < CLASSES)


def _check(name: str, scores: Tensor, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError or TypeError unless scores, map and weight fit one another and the kernels."""
    classes, channels = weight.shape
    expected = (x.shape[0], classes, *x.shape[1:4])
    if scores.shape != expected or scores.device != x.device or weight.device != x.device or channels != x.shape[4]:
        raise ValueError(
            f"x is {tuple(x.shape)} on {x.device} and weight {tuple(weight.shape)} on {weight.device}: "
            f"expected {name} {expected} there, got {tuple(scores.shape)} on {scores.device}"
        )
    if not 1 <= classes <= MOST_CLASSES:
        raise ValueError(f"{classes} classes; the kernels take 1 to {MOST_CLASSES}")
    if weight.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"weight is {weight.dtype}, expected {x.dtype} or float32")


def _summands(operand: torch.dtype, weight: torch.dtype) -> int:
    """How many numbers of precision `operand` add up to one weight; 0 if one product does."""
    return 0 if operand == weight or operand == torch.float32 else 2 if operand == torch.float16 else 3


def backward_blocks(classes: int, channels: int, half: bool, tile: Tile = BACKWARD) -> tuple[int, int, int, int]:
    """Pixels, classes and channels of a tile, and warps; float32 products take more registers: smaller tiles, more warps."""
    block_m = max(16, power_of_two(classes))
    block_k = min(64 if half else 32, max(16, power_of_two(channels)))
    share = 1 if half else 2
    block_p = min(64 // share, max(16, tile.elements // share // max(block_m, block_k)))
    return block_p, block_m, block_k, tile.warps * share


def head(
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    affine: Affine | None = None,
    slope: float = 0.0,
    config: Tile | None = None,
) -> None:
    """See `naive.head`. Reads x once and writes out once."""
    tile = config or Tile()
    _check("out", out, x, weight)
    (classes, channels), images, pixels = weight.shape, x.shape[0], x.shape[1:4].numel()
    if bias.shape != (classes,) or not out.is_contiguous():
        raise ValueError(f"bias is {tuple(bias.shape)}, out has strides {out.stride()}: expected [{classes}], contiguous")
    if out.numel() == 0:
        return
    few = classes <= FEW_CLASSES and channels <= FEW_CHANNELS
    block_m, block_k = max(16, power_of_two(classes)), power_of_two(channels)
    block_k = block_k if few else min(64, max(16, block_k))
    block_p = max(16, tile.elements // (block_k if few else block_m))
    tiles = ceil_div(pixels, block_p)
    shared = {
        "out_ptr": out, **map_arguments(x=x), "weight_ptr": weight.contiguous(), "bias_ptr": bias.contiguous(),
        **affine_arguments(x, affine), "pixels": pixels, "tiles": tiles, "K": channels, "CLASSES": classes,
        "AFFINE": affine is not None, "SLOPE": slope, "BLOCK_P": block_p, "BLOCK_K": block_k,
    }  # fmt: skip
    with device_of(x):
        if few:
            warps = tile.warps * (2 if block_p * block_k > 2 * tile.elements else 1)
            _head_few_kernel[(images * tiles,)](**shared, num_warps=warps)
        else:
            summands, steps = _summands(x.dtype, weight.dtype), ceil_div(channels, block_k)
            _head_kernel[(images * tiles,)](**shared, SUMMANDS=summands, STEPS=steps, BLOCK_M=block_m, num_warps=tile.warps)


def head_backward(
    gx: Tensor,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    affine: Affine | None = None,
    slope: float = 0.0,
    add: bool = False,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `naive.head_backward`. Reads x once, writes gx once and with `add` reads it; reads dy once per 64 channels."""
    tile = config or BACKWARD
    _check("dy", dy, x, weight)
    check_same("gx", gx, x)
    (classes, channels), images, pixels = weight.shape, x.shape[0], x.shape[1:4].numel()
    if x.numel() == 0:
        return x.new_zeros(classes, channels, dtype=torch.float32), x.new_zeros(classes, dtype=torch.float32)
    half = x.dtype == dy.dtype != torch.float32
    block_p, block_m, block_k, warps = backward_blocks(classes, channels, half, tile)
    blocks = ceil_div(channels, block_k)
    tiles = ceil_div(pixels, block_p)
    aim = max(1, tile.programs // (images * blocks))
    # At least 16 pixels per class: a chunk's sums are then small compared with its pixels.
    steps = power_of_two(max(ceil_div(tiles, aim), ceil_div(min(16 * classes, pixels), block_p)))
    chunks = ceil_div(tiles, steps)
    sums = scratch.empty(x, images * chunks, classes * (channels + 1))  # of a chunk: of the weight, then of the bias
    with device_of(x):
        _head_backward_kernel[(images * chunks, blocks)](
            **map_arguments(gx=gx, x=x), dy_ptr=dy.contiguous(), weight_ptr=weight.contiguous(),
            **affine_arguments(x, affine), sums_ptr=sums,
            pixels=pixels, chunks=chunks, K=channels, CLASSES=classes, AFFINE=affine is not None, SLOPE=slope, ADD=add,
            HALF=half, SUMMANDS=_summands(x.dtype if half else torch.float32, weight.dtype),
            STEPS=steps, BLOCK_P=block_p, BLOCK_M=block_m, BLOCK_K=block_k, num_warps=warps,
        )  # fmt: skip
        total = sums.sum(dim=0)
        return total[: classes * channels].view(classes, channels), total[classes * channels :]
