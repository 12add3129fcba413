"""Norm statistics, and the backward passes of norm, activation and border table.

A map `[N, D, H, W, C]` is read as `[N, pixels, C]` with a constant distance between pixels, so one kernel serves 2D, 3D
and any slice of a level buffer. Sums are taken per chunk of pixels in float32 and the chunks' sums added in a fixed
order. How a map is cut depends only on its shape, not on the GPU: equal inputs give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from .jit import kernel
from .maps import Tile, ceil_div, check_same, device_of, load_row, map_arguments, power_of_two, row_arguments
from .naive import Affine, Averages

GROUP = 512  # parts of a statistic that one program combines, if there are more than twice as many


@kernel
def _norm_finalise_kernel(
    stats_ptr, weight_ptr, bias_ptr, out_ptr, out_stride, out_stride_row, moments_ptr, moments_stride, parts, eps, C,
    FINAL: tl.constexpr, STEPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Chan's combination of parts A and B, with d = mean_B - mean_A and n = n_A + n_B:

        mean = mean_A + d n_B / n          squares = squares_A + squares_B + d^2 n_A n_B / n

    stats [rows, parts, 3, C]; a program takes one row, STEPS tiles of BLOCK_T parts and a block of channels. Each lane of
    the tile combines its parts over the steps, then lanes are combined. Writes [rows, groups, 3, C]; if FINAL mean, inverse
    deviation, scale and shift, `out_stride` apart, and mean and unbiased variance to moments, if there are any.
    """
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.arange(0, BLOCK_T)
    count = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    mean = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for step in range(STEPS):
        first = (group * STEPS + step) * BLOCK_T
        where = stats_ptr + (row * parts + first) * 3 * C + t[:, None] * 3 * C + c[None, :]
        mask = (t < parts - first)[:, None] & (c < C)[None, :]
        part = tl.load(where, mask=mask, other=0.0)
        delta = tl.load(where + C, mask=mask, other=0.0) - mean
        total = count + part
        share = part / tl.maximum(total, 1.0)
        mean += delta * share
        squares += tl.load(where + 2 * C, mask=mask, other=0.0) + delta * delta * count * share
        count = total
    total = tl.sum(count, axis=0)
    divisor = tl.maximum(total, 1.0)
    centre = tl.sum(count * mean, axis=0) / divisor
    delta = mean - centre[None, :]
    combined = tl.sum(squares + count * delta * delta, axis=0)
    if FINAL:
        variance = combined / divisor
        inverse = tl.div_rn(tl.full((BLOCK_C,), 1.0, tl.float32), tl.sqrt_rn(variance + eps))
        scale = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32) * inverse
        shift = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32) - centre * scale
        out_ptr += row * out_stride_row + c
        tl.store(out_ptr, centre, mask=c < C)
        tl.store(out_ptr + out_stride, inverse, mask=c < C)
        tl.store(out_ptr + 2 * out_stride, scale, mask=c < C)
        tl.store(out_ptr + 3 * out_stride, shift, mask=c < C)
        if moments_ptr is not None:
            tl.store(moments_ptr + c, centre, mask=c < C)
            tl.store(moments_ptr + moments_stride + c, combined / tl.maximum(total - 1.0, 1.0), mask=c < C)
    else:
        out_ptr += (row * tl.num_programs(1) + group) * 3 * C + c
        tl.store(out_ptr, total, mask=c < C)
        tl.store(out_ptr + C, centre, mask=c < C)
        tl.store(out_ptr + 2 * C, combined, mask=c < C)


def norm_table(
    table: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, instance: bool, moments: Tensor | None = None
) -> None:
    """See `naive.norm_table`. Reads the statistics once; one launch up to 8 GROUP parts, one more per factor GROUP."""
    if stats.dtype != torch.float32 or stats.ndim != 4 or stats.shape[2] != 3:
        raise ValueError(f"expected float32 statistics [N, T, 3, C], got {stats.dtype} {tuple(stats.shape)}")
    channels = stats.shape[3]
    if weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(f"expected weight and bias [{channels}], got {tuple(weight.shape)} and {tuple(bias.shape)}")
    stats, weight, bias = stats.contiguous(), weight.contiguous(), bias.contiguous()
    rows, parts = (stats.shape[0], stats.shape[1]) if instance else (1, stats.shape[0] * stats.shape[1])
    _check_slots(table, (4, rows, channels), stats)
    if moments is not None:
        _check_slots(moments, (2, channels), stats)
    if table.numel() == 0:
        return
    block_c = min(power_of_two(channels), 8)  # 32 bytes: few channels per program, so that there are many
    blocks = ceil_div(channels, block_c)
    shared = {"weight_ptr": weight, "bias_ptr": bias, "eps": eps, "C": channels, "BLOCK_C": block_c}
    out = {"out_ptr": table, "out_stride": table.stride(0), "out_stride_row": table.stride(1)}
    out |= {"moments_ptr": moments, "moments_stride": 0 if moments is None else moments.stride(0)}
    with device_of(stats):
        while parts > 8 * GROUP:
            groups = ceil_div(parts, GROUP)
            combined = stats.new_empty(rows, groups, 3, channels)
            between = {"out_ptr": combined, "out_stride": 0, "out_stride_row": 0, "moments_ptr": None, "moments_stride": 0}
            _norm_finalise_kernel[(rows, groups, blocks)](
                stats_ptr=stats, **between, parts=parts, FINAL=False, STEPS=2, BLOCK_T=GROUP // 2, **shared
            )
            stats, parts = combined, groups
        block_t = min(power_of_two(parts), 256)
        steps = ceil_div(parts, block_t)
        _norm_finalise_kernel[(rows, 1, blocks)](
            stats_ptr=stats, **out, parts=parts, FINAL=True, STEPS=steps, BLOCK_T=block_t, **shared
        )


def _check_slots(x: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """Raises ValueError unless x has the shape, its channels side by side, in float32 on the device of `like`."""
    if tuple(x.shape) != shape or x.dtype != like.dtype or x.device != like.device or (shape[-1] > 1 and x.stride(-1) != 1):
        raise ValueError(
            f"expected {like.dtype} {shape} on {like.device}, channels side by side, got {x.dtype} {tuple(x.shape)},"
            f" {x.stride()} on {x.device}"
        )


@triton.jit
def _through_norm(g, x, n, c, C, mean_ptr, mean_stride, inverse_ptr, inverse_stride,
                  scale_ptr, scale_stride, shift_ptr, shift_stride, SLOPE: tl.constexpr):  # fmt: skip
    """h = g act'(scale x + shift), z = (x - mean) inverse, and scale; h is zero where g is, so past the map's edges."""
    x = x.to(tl.float32)
    g = g.to(tl.float32)
    scale = load_row(scale_ptr, scale_stride, n, c, C)
    h = tl.where(x * scale + load_row(shift_ptr, shift_stride, n, c, C) > 0, g, g * SLOPE)
    z = (x - load_row(mean_ptr, mean_stride, n, c, C)) * load_row(inverse_ptr, inverse_stride, n, c, C)
    return h, z, scale


@kernel
def _norm_sums_kernel(
    g_ptr, g_stride_n, g_stride_p, x_ptr, x_stride_n, x_stride_p, mean_ptr, mean_stride, inverse_ptr, inverse_stride,
    scale_ptr, scale_stride, shift_ptr, shift_stride, sums_ptr, pixels, chunks, C,
    SLOPE: tl.constexpr, FROZEN: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[n, chunk] = (sum h, sum h z) over the chunk's pixels; g <- scale h if FROZEN. sums [N, chunks, 2, C]."""
    n, chunk = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    sum_h = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sum_hz = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        mask = (p < pixels - first)[:, None] & (c < C)[None, :]
        g_where = g_ptr + n * g_stride_n + first * g_stride_p + p[:, None] * g_stride_p + c[None, :]
        g = tl.load(g_where, mask=mask, other=0.0)
        x = tl.load(x_ptr + n * x_stride_n + first * x_stride_p + p[:, None] * x_stride_p + c[None, :], mask=mask, other=0.0)
        h, z, scale = _through_norm(
            g, x, n, c, C, mean_ptr, mean_stride, inverse_ptr, inverse_stride,
            scale_ptr, scale_stride, shift_ptr, shift_stride, SLOPE,
        )  # fmt: skip
        sum_h += h
        sum_hz += h * z
        if FROZEN:
            tl.store(g_where, (scale * h).to(g_ptr.dtype.element_ty), mask=mask)
    sums_ptr += tl.program_id(0).to(tl.int64) * 2 * C + c
    tl.store(sums_ptr, tl.sum(sum_h, axis=0), mask=c < C)
    tl.store(sums_ptr + C, tl.sum(sum_hz, axis=0), mask=c < C)


@kernel
def _norm_apply_kernel(
    g_ptr, g_stride_n, g_stride_p, x_ptr, x_stride_n, x_stride_p, mean_ptr, mean_stride, inverse_ptr, inverse_stride,
    scale_ptr, scale_stride, shift_ptr, shift_stride, averages_ptr, averages_stride, count, pixels, tiles, C,
    SLOPE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g <- scale (h - mean(h) - z mean(h z)). averages [1 or N, 2, C]: count times the means."""
    n, first = (tl.program_id(0) // tiles).to(tl.int64), (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_P
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    mask = (p < pixels - first)[:, None] & (c < C)[None, :]
    g_where = g_ptr + n * g_stride_n + first * g_stride_p + p[:, None] * g_stride_p + c[None, :]
    g = tl.load(g_where, mask=mask, other=0.0)
    x = tl.load(x_ptr + n * x_stride_n + first * x_stride_p + p[:, None] * x_stride_p + c[None, :], mask=mask, other=0.0)
    h, z, scale = _through_norm(
        g, x, n, c, C, mean_ptr, mean_stride, inverse_ptr, inverse_stride,
        scale_ptr, scale_stride, shift_ptr, shift_stride, SLOPE,
    )  # fmt: skip
    mean_h = load_row(averages_ptr, averages_stride, n, c, C) / count
    mean_hz = load_row(averages_ptr + C, averages_stride, n, c, C) / count
    tl.store(g_where, (scale * (h - mean_h - z * mean_hz)).to(g_ptr.dtype.element_ty), mask=mask)


def norm_backward(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse: Tensor,
    affine: Affine,
    slope: float,
    frozen: bool,
    averages: Averages | None = None,
    config: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """See `naive.norm_backward`. Reads g and x twice, once if `frozen`, and writes g once."""
    tile = config or Tile()
    check_same("x", x, g)
    images, pixels, channels = g.shape[0], g.shape[1:4].numel(), g.shape[4]
    if g.numel() == 0:
        zeros = g.new_zeros(2, channels, dtype=torch.float32)
        if averages is not None and not frozen:
            averages(zeros, 0)  # the other processes wait for this one
        return zeros[0], zeros[1]
    block_p, block_c = tile.blocks(pixels, channels)
    blocks = ceil_div(channels, block_c)
    chunks, steps = tile.chunks(images, pixels, channels)
    shared = {
        **map_arguments(g=g, x=x), **row_arguments(x, mean=mean, inverse=inverse, scale=affine[0], shift=affine[1]),
        "pixels": pixels, "C": channels, "SLOPE": slope, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": tile.warps,
    }  # fmt: skip
    sums = scratch.empty(g, images, chunks, 2, channels)
    with device_of(g):
        _norm_sums_kernel[(images * chunks, blocks)](sums_ptr=sums, chunks=chunks, FROZEN=frozen, STEPS=steps, **shared)
        instance = mean.shape[0] > 1
        of_images = sums.sum(dim=1) if instance else None
        total = of_images.sum(dim=0) if instance else sums.flatten(0, 1).sum(dim=0)
        if not frozen:
            means, count = (of_images, pixels) if instance else (total, images * pixels)
            if averages is not None:
                means, count = averages(total, images * pixels), 1
            tiles = ceil_div(pixels, block_p)
            _norm_apply_kernel[(images * tiles, blocks)](
                averages_ptr=means,
                averages_stride=2 * channels if instance else 0,
                count=float(count),
                tiles=tiles,
                **shared,
            )
    return total[1], total[0]


@kernel
def _act_backward_kernel(
    g_ptr, g_stride_n, g_stride_p, out_ptr, out_stride_n, out_stride_p, sums_ptr, pixels, chunks, C,
    SLOPE: tl.constexpr, STEPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g <- g where out > 0, slope g elsewhere; sums[n, chunk] = the sum of g as stored. out: the activation's output."""
    n, chunk = (tl.program_id(0) // chunks).to(tl.int64), (tl.program_id(0) % chunks).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for step in range(STEPS):
        first = (chunk * STEPS + step) * BLOCK_P
        mask = (p < pixels - first)[:, None] & (c < C)[None, :]
        g_where = g_ptr + n * g_stride_n + first * g_stride_p + p[:, None] * g_stride_p + c[None, :]
        g = tl.load(g_where, mask=mask, other=0.0)
        out_where = out_ptr + n * out_stride_n + first * out_stride_p + p[:, None] * out_stride_p + c[None, :]
        out = tl.load(out_where, mask=mask, other=0.0)
        g = tl.where(out > 0, g.to(tl.float32), g.to(tl.float32) * SLOPE).to(g_ptr.dtype.element_ty)
        tl.store(g_where, g, mask=mask)
        total += g.to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * C + c, tl.sum(total, axis=0), mask=c < C)


def act_backward(g: Tensor, out: Tensor, slope: float, config: Tile | None = None) -> Tensor:
    """See `naive.act_backward`. Reads g and out once, writes g once."""
    tile = config or Tile()
    check_same("out", out, g)
    images, pixels, channels = g.shape[0], g.shape[1:4].numel(), g.shape[4]
    if g.numel() == 0:
        return g.new_zeros(channels, dtype=torch.float32)
    block_p, block_c = tile.blocks(pixels, channels)
    chunks, steps = tile.chunks(images, pixels, channels)
    sums = scratch.empty(g, images * chunks, channels)
    with device_of(g):
        _act_backward_kernel[(images * chunks, ceil_div(channels, block_c))](
            **map_arguments(g=g, out=out), sums_ptr=sums, pixels=pixels, chunks=chunks, C=channels,
            SLOPE=slope, STEPS=steps, BLOCK_P=block_p, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip
        return sums.sum(dim=0)


@kernel
def _border_kernel(
    dy_ptr, dy_stride_n, dy_stride_p, sums_ptr, images, depth, height, width, groups, C,
    BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """sums[class, group] = (first, sum of inner, last) over lines of pixels along W; a single pixel is the last.

    A program takes every groups-th line of a class of lines, of `[N, depth, height]`; programs are numbered over classes
    (of depth, then height) and groups. sums [classes, groups, 3, C].
    """
    row, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first_y, lines_y = _lines(row % 3, height)
    first_z, lines_z = _lines(tl.where(tl.num_programs(0) > 3 * groups, row // 3, 2), depth)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_W, BLOCK_C), tl.float32)
    first = tl.zeros((BLOCK_C,), tl.float32)
    last = tl.zeros((BLOCK_C,), tl.float32)
    for line in range(group, images * lines_z * lines_y, groups):
        y, z, n = first_y + line % lines_y, first_z + line // lines_y % lines_z, line // lines_y // lines_z
        start = n.to(tl.int64) * dy_stride_n + (z.to(tl.int64) * height + y) * width * dy_stride_p + c
        for left in range(0, width, BLOCK_W):
            x = left + tl.arange(0, BLOCK_W)
            mask = ((x > 0) & (x < width - 1))[:, None] & (c < C)[None, :]
            where = dy_ptr + start[None, :] + x.to(tl.int64)[:, None] * dy_stride_p
            total += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        first += tl.load(dy_ptr + start, mask=c < tl.where(width > 1, C, 0), other=0.0).to(tl.float32)
        last += tl.load(dy_ptr + start + (n.to(tl.int64) * 0 + width - 1) * dy_stride_p, mask=c < C, other=0.0).to(
            tl.float32
        )
    sums_ptr += tl.program_id(0).to(tl.int64) * 3 * C + c
    tl.store(sums_ptr, first, mask=c < C)
    tl.store(sums_ptr + C, tl.sum(total, axis=0), mask=c < C)
    tl.store(sums_ptr + 2 * C, last, mask=c < C)


@triton.jit
def _lines(border, size):
    """The first line of a border class along an axis, and how many there are; a single line is of the last class."""
    return tl.where(border == 0, 0, tl.where(border == 1, 1, size - 1)), tl.where(
        border == 0, tl.minimum(size - 1, 1), tl.where(border == 1, tl.maximum(size - 2, 0), 1)
    )


def border_sums(dy: Tensor, axes: int, config: Tile | None = None) -> Tensor:
    """See `naive.border_sums`. Reads dy once; sums by groups of lines along W first."""
    tile = config or Tile()
    images, depth, height, width, channels = dy.shape
    if dy.numel() == 0:
        return dy.new_zeros(3**axes, channels, dtype=torch.float32)
    block_w, block_c = tile.blocks(width, channels)
    classes, blocks = 3 ** (axes - 1), ceil_div(channels, block_c)
    groups = min(images * depth * height, max(1, tile.programs // (classes * blocks)))
    sums = scratch.empty(dy, classes, groups, 3, channels)
    with device_of(dy):
        _border_kernel[(classes * groups, blocks)](
            **map_arguments(dy=dy), sums_ptr=sums, images=images, depth=depth, height=height, width=width, groups=groups,
            C=channels, BLOCK_W=block_w, BLOCK_C=block_c, num_warps=tile.warps,
        )  # fmt: skip
        return sums.sum(dim=1).view(3**axes, channels)
