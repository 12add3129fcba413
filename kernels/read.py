"""The passes over whole maps that a library's convolution needs before and after it.

    read:    y = act(scale x + shift), what readers of a raw map see
    finish:  out (+)= act(first + second + bias + border class), with statistics of what was stored

The fused convolution does both as it loads and stores. As passes they cost a read and a write of the map each, which
pays where the convolution itself, by cuDNN or without the transform in its loop, gains more than that.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from .jit import kernel
from .maps import (
    Tile,
    activate,
    affine_arguments,
    border_class,
    ceil_div,
    device_of,
    load_row,
    map_arguments,
    store_statistics,
)
from .naive import Affine


@kernel
def _read_kernel(
    y_ptr, x_ptr, x_stride_n, x_stride_p, scale_ptr, scale_stride, shift_ptr, shift_stride, pixels, tiles, C,
    SLOPE: tl.constexpr, PLAIN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_P pixels and BLOCK_C channels of one image; y is dense. The first PLAIN channels are copied."""
    n, first = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    mask = (p < pixels - first)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + n * x_stride_n + first * x_stride_p + p[:, None] * x_stride_p + c[None, :], mask=mask, other=0.0)
    scale, shift = load_row(scale_ptr, scale_stride, n, c, C), load_row(shift_ptr, shift_stride, n, c, C)
    y = activate(x.to(tl.float32) * scale + shift, SLOPE).to(y_ptr.dtype.element_ty)
    if PLAIN:
        y = tl.where((c < PLAIN)[None, :], x, y)
    tl.store(y_ptr + (n * pixels + first) * C + p[:, None] * C + c[None, :], y, mask=mask)


def read(x: Tensor, affine: Affine | None, slope: float, plain: int = 0) -> Tensor:
    """See `naive.read`; the result is dense, or `x` itself without `affine`. Reads x and writes the result once."""
    if affine is None:
        return x
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if x.numel() == 0:
        return y
    tile, pixels, channels = Tile(), x.shape[1:4].numel(), x.shape[4]
    block_p, block_c = tile.blocks(pixels, channels)
    tiles = ceil_div(pixels, block_p)
    with device_of(x):
        _read_kernel[(x.shape[0] * tiles, ceil_div(channels, block_c))](
            y_ptr=y, **map_arguments(x=x), **affine_arguments(x, affine), pixels=pixels, tiles=tiles, C=channels,
            SLOPE=slope, PLAIN=plain, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip
    return y


@kernel
def _finish_kernel(
    out_ptr, out_stride_n, out_stride_p, first_ptr, second_ptr, bias_ptr, border_ptr, stats_ptr,
    depth, height, width, tiles, C,
    AXES: tl.constexpr, ACTIVATE: tl.constexpr, SLOPE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A tile of BLOCK_P pixels and BLOCK_C channels of one image; first and second are dense, stats [N, tiles, 3, C]."""
    n, start = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    pixels = tl.cast(depth, tl.int64) * height * width
    inside = p < pixels - start
    mask = inside[:, None] & (c < C)[None, :]
    from_part = (n * pixels + start) * C + p[:, None] * C + c[None, :]
    total = tl.load(first_ptr + from_part, mask=mask, other=0.0).to(tl.float32)
    if second_ptr is not None:
        total += tl.load(second_ptr + from_part, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + c, mask=c < C, other=0.0)[None, :]
    if border_ptr is not None:
        pixel = start + p
        row = border_class(pixel // width % height, height) * 3 + border_class(pixel % width, width)
        if AXES == 3:
            row += border_class(pixel // width // height, depth) * 9
        total += tl.load(border_ptr + row[:, None] * C + c[None, :], mask=mask, other=0.0)
    if ACTIVATE:
        total = activate(total, SLOPE)
    where = out_ptr + n * out_stride_n + start * out_stride_p + p[:, None] * out_stride_p + c[None, :]
    if ADD:
        total += tl.load(where, mask=mask, other=0.0).to(tl.float32)
    result = total.to(out_ptr.dtype.element_ty)
    tl.store(where, result, mask=mask)
    if stats_ptr is not None:
        store_statistics(result.to(tl.float32), inside, stats_ptr + tl.program_id(0).to(tl.int64) * 3 * C, c, C)


def finish(
    out: Tensor,
    first: Tensor,
    second: Tensor | None,
    *,
    axes: int,
    bias: Tensor | None,
    border: Tensor | None,
    act: bool,
    slope: float,
    add: bool,
    stats: bool,
) -> Tensor | None:
    """out = epilogue(first + second) for dense `first` and `second` of its size: what `naive.conv` does after its sums."""
    images, pixels, channels = out.shape[0], out.shape[1:4].numel(), out.shape[4]
    tile = Tile()
    block_p, block_c = tile.blocks(pixels, channels)
    tiles = ceil_div(pixels, block_p)
    partial = out.new_empty(images, tiles, 3, channels, dtype=torch.float32) if stats else None
    if out.numel() == 0:
        return partial
    depth, height, width = out.shape[1:4]
    with device_of(out):
        _finish_kernel[(images * tiles, ceil_div(channels, block_c))](
            **map_arguments(out=out), first_ptr=first, second_ptr=second, bias_ptr=bias, border_ptr=border,
            stats_ptr=partial, depth=depth, height=height, width=width, tiles=tiles, C=channels,
            AXES=axes, ACTIVATE=act, SLOPE=slope, ADD=add, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip
    return partial
