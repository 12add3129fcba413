"""2x2 (2x2x2) max pooling of what readers of a raw map see, and its gradient; no index map is stored."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .jit import kernel
from .maps import Tile, affine_arguments, ceil_div, check_same, device_of, load_activated, load_row, map_arguments
from .naive import Affine


@triton.jit
def _window_row(depth, height, AXES: tl.constexpr):
    """Image, the pooled row's number in it, and the first pixel row of its windows, of this program; all int64."""
    line = tl.program_id(0).to(tl.int64)
    n, row = line // (depth * height), line % (depth * height)
    FACTOR_Z: tl.constexpr = 2 if AXES == 3 else 1
    return n, row, (row // height * FACTOR_Z * height + row % height) * 2


@triton.jit
def _pixel(q: tl.constexpr, height, width):
    """The distance of pixel q of a window, in row-major order, from its first, in pixels; int64."""
    return tl.cast((q // 4 * 2 * height + q // 2 % 2) * 2 * width + q % 2, tl.int64)


@kernel
def _pool_kernel(
    out_ptr, out_stride_n, out_stride_p, x_ptr, x_stride_n, x_stride_p, scale_ptr, scale_stride, shift_ptr, shift_stride,
    depth, height, width, C,
    AXES: tl.constexpr, AFFINE: tl.constexpr, SLOPE: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[o] = max over q in {0,1}^AXES of act(scale x[2 o + q] + shift).

    A program takes part of a row of out, BLOCK_W pixels and BLOCK_C channels; depth, height, width: of out.
    """
    n, row, first = _window_row(depth, height, AXES)
    start = tl.program_id(1) * BLOCK_W
    u = tl.arange(0, BLOCK_W)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (u < width - start)[:, None] & (c < C)[None, :]
    scale, shift = 1.0, 0.0
    if AFFINE:
        scale, shift = load_row(scale_ptr, scale_stride, n, c, C), load_row(shift_ptr, shift_stride, n, c, C)
    x_ptr += n * x_stride_n + (first * width + start) * 2 * x_stride_p + u[:, None] * 2 * x_stride_p + c[None, :]
    best = load_activated(x_ptr, mask, scale, shift, AFFINE, SLOPE).to(tl.float32)
    for q in tl.static_range(1, 8 if AXES == 3 else 4):
        where = x_ptr + _pixel(q, height, width) * x_stride_p
        value = load_activated(where, mask, scale, shift, AFFINE, SLOPE).to(tl.float32)
        best = tl.where((value > best) | (value != value), value, best)  # NaN stays, as it does in PyTorch
    out_ptr += n * out_stride_n + (row * width + start) * out_stride_p + u[:, None] * out_stride_p + c[None, :]
    tl.store(out_ptr, best.to(out_ptr.dtype.element_ty), mask=mask)


@kernel
def _pool_backward_kernel(
    gx_ptr, gx_stride_n, gx_stride_p, g_ptr, g_stride_n, g_stride_p, x_ptr, x_stride_n, x_stride_p,
    scale_ptr, scale_stride, shift_ptr, shift_stride, depth, height, width, C,
    AXES: tl.constexpr, AFFINE: tl.constexpr, SLOPE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gx[2 o + q] (+)= g[o] where q is the first in row-major order to hold the maximum, else 0. As _pool_kernel.

    Values are compared as readers see them: those that round to one number are a tie.
    """
    n, row, first = _window_row(depth, height, AXES)
    start = tl.program_id(1) * BLOCK_W
    u = tl.arange(0, BLOCK_W)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (u < width - start)[:, None] & (c < C)[None, :]
    scale, shift = 1.0, 0.0
    if AFFINE:
        scale, shift = load_row(scale_ptr, scale_stride, n, c, C), load_row(shift_ptr, shift_stride, n, c, C)
    x_ptr += n * x_stride_n + (first * width + start) * 2 * x_stride_p + u[:, None] * 2 * x_stride_p + c[None, :]
    best = load_activated(x_ptr, mask, scale, shift, AFFINE, SLOPE).to(tl.float32)
    chosen = tl.zeros((BLOCK_W, BLOCK_C), tl.int32)
    for q in tl.static_range(1, 8 if AXES == 3 else 4):
        where = x_ptr + _pixel(q, height, width) * x_stride_p
        value = load_activated(where, mask, scale, shift, AFFINE, SLOPE).to(tl.float32)
        above = (value > best) | ((value != value) & (best == best))
        best = tl.where(above, value, best)
        chosen = tl.where(above, q, chosen)
    g_ptr += n * g_stride_n + (row * width + start) * g_stride_p + u[:, None] * g_stride_p + c[None, :]
    g = tl.load(g_ptr, mask=mask, other=0.0).to(tl.float32)
    gx_ptr += n * gx_stride_n + (first * width + start) * 2 * gx_stride_p + u[:, None] * 2 * gx_stride_p + c[None, :]
    for q in tl.static_range(8 if AXES == 3 else 4):
        where = gx_ptr + _pixel(q, height, width) * gx_stride_p
        part = tl.where(chosen == q, g, 0.0)
        if ADD:
            part += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        tl.store(where, part.to(gx_ptr.dtype.element_ty), mask=mask)


def _geometry(name: str, small: Tensor, x: Tensor, axes: int, tile: Tile) -> tuple[tuple[int, int, int], dict[str, int]]:
    """The grid, and a kernel's sizes and blocks; raises ValueError unless `small` is half of x along each axis."""
    images, depth, height, width, channels = small.shape
    if (images, depth * (2 if axes == 3 else 1), height * 2, width * 2, channels) != x.shape:
        raise ValueError(f"{name} is {tuple(small.shape)}, not half of {tuple(x.shape)} on {axes} axes")
    if small.device != x.device:
        raise ValueError(f"{name} is on {small.device}, x on {x.device}")
    block_w, block_c = tile.blocks(width, channels)
    grid = (images * depth * height, ceil_div(width, block_w), ceil_div(channels, block_c))
    sizes = {"depth": depth, "height": height, "width": width, "C": channels}
    return grid, sizes | {"AXES": axes, "BLOCK_W": block_w, "BLOCK_C": block_c, "num_warps": tile.warps}


def pool(
    out: Tensor, x: Tensor, *, axes: int, affine: Affine | None = None, slope: float = 0.0, config: Tile | None = None
) -> None:
    """See `naive.pool`. Reads x once and writes out once."""
    grid, geometry = _geometry("out", out, x, axes, config or Tile())
    if out.numel() == 0:
        return
    operands = map_arguments(out=out, x=x) | affine_arguments(x, affine)
    with device_of(x):
        _pool_kernel[grid](**operands, **geometry, AFFINE=affine is not None, SLOPE=slope)


def pool_backward(
    gx: Tensor,
    g: Tensor,
    x: Tensor,
    *,
    axes: int,
    affine: Affine | None = None,
    slope: float = 0.0,
    add: bool = False,
    config: Tile | None = None,
) -> None:
    """See `naive.pool_backward`. Reads x and g once, writes gx once and with `add` reads it."""
    check_same("gx", gx, x)
    grid, geometry = _geometry("g", g, x, axes, config or Tile(elements=1024))
    if g.numel() == 0:
        return
    operands = map_arguments(gx=gx, g=g, x=x) | affine_arguments(x, affine)
    with device_of(x):
        _pool_backward_kernel[grid](**operands, **geometry, AFFINE=affine is not None, SLOPE=slope, ADD=add)
