"""Convolutions over a prefix and a low source that are never concatenated or up-sampled.

    out[o] = epilogue( sum_t act(a[o + t]) Wa[t]  +  sum_t act(b[u + t]) Wb[p, t]  +  bias )      o = 2u + p

`a` is the leading channels of a level buffer (the prefix: one operand however many nodes it holds), `b` a slice of the
level below, read at its own resolution: output pixel 2u + p of conv3(up2(b)) is a 2-tap convolution whose weights
depend on the phase p alone. Every tensor is channels-last, `[N, D, H, W, C]` with D = 1 in 2D.

One kernel serves all uses. An operand is sampled at `stride * unit + base + t`, t = 0..taps-1 on each axis:

    use                           unit grid   a: taps, stride, base    b: taps, stride, base
    convolution, no low source    output      3, 1, -1                 none
    convolution with low source   low level   3, 2, p - 1              2, 1, p - 1
    data gradient of the prefix   output      3, 1, -1 (flipped W)     none
    data gradient of the low one  low level   4, 2, -1                 none
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _activate(x, SLOPE: tl.constexpr):
    """Leaky ReLU; ReLU where SLOPE is 0."""
    return tl.where(x >= 0, x, x * SLOPE)


@triton.jit
def _accumulate(
    acc, x_ptr, scale_ptr, shift_ptr, w_ptr,
    stride_pixel, depth, height, width, z0, y0, x0, co, CO,
    K: tl.constexpr, TAPS: tl.constexpr, AXES: tl.constexpr, BLOCK_K: tl.constexpr,
    AFFINE: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc [M, CO] += sum over taps t and channels k of act(x[z0 + tz, y0 + ty, x0 + tx, k] scale + shift) w[t, k, co].

    x_ptr, scale_ptr and shift_ptr stand at the image's first element; w: [TAPS^AXES, K, CO]. The padding is zero after
    norm and activation, so the mask is applied after them.
    """
    K_STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    STEPS: tl.constexpr = (TAPS * TAPS * TAPS if AXES == 3 else TAPS * TAPS) * K_STEPS
    for step in range(STEPS):
        tap = step // K_STEPS
        k = (step % K_STEPS) * BLOCK_K + tl.arange(0, BLOCK_K)
        x = x0 + tap % TAPS
        y = y0 + (tap // TAPS) % TAPS
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        pixel = y * width + x
        if AXES == 3:
            z = z0 + tap // (TAPS * TAPS)
            inside = inside & (z >= 0) & (z < depth)
            pixel = z * height * width + pixel
        mask = inside[:, None] & (k < K)[None, :] if K % BLOCK_K else inside[:, None]
        value = tl.load(x_ptr + pixel.to(tl.int64)[:, None] * stride_pixel + k[None, :], mask=mask, other=0.0)
        if AFFINE:
            scale = tl.load(scale_ptr + k, mask=k < K, other=0.0)[None, :]
            shift = tl.load(shift_ptr + k, mask=k < K, other=0.0)[None, :]
            raw = value.to(tl.float32) * scale + shift
            value = tl.where(mask, _activate(raw, SLOPE), 0.0).to(value.dtype)
        weight_mask = (k < K)[:, None] & (co < CO)[None, :]
        weight = tl.load(w_ptr + (tap * K + k)[:, None] * CO + co[None, :], mask=weight_mask, other=0.0)
        acc = tl.dot(value, weight, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _conv_kernel(
    a_ptr, a_scale_ptr, a_shift_ptr, wa_ptr, stride_an, stride_ap,
    b_ptr, b_scale_ptr, b_shift_ptr, wb_ptr, stride_bn, stride_bp,
    bias_ptr, border_ptr, out_ptr, stride_on, stride_op, stats_ptr,
    depth, height, width, tiles_y, tiles_x, CO, affine_an, affine_bn,
    KA: tl.constexpr, KB: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, PHASED: tl.constexpr,
    AXES: tl.constexpr, AFFINE_A: tl.constexpr, AFFINE_B: tl.constexpr, SLOPE: tl.constexpr,
    BIAS: tl.constexpr, BORDER: tl.constexpr, ACTIVATE: tl.constexpr, STATS: tl.constexpr, ADD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of units, one phase, one block of output channels. depth, height, width: of the unit grid."""
    PHASES: tl.constexpr = (8 if AXES == 3 else 4) if PHASED else 1
    tile, phase = tl.program_id(0) // PHASES, tl.program_id(0) % PHASES
    n = tl.program_id(2).to(tl.int64)
    co = tl.program_id(1) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    px, py, pz = phase % 2, (phase // 2) % 2, phase // 4

    m = tl.arange(0, BLOCK_D * BLOCK_H * BLOCK_W)
    x = (tile % tiles_x) * BLOCK_W + m % BLOCK_W
    y = ((tile // tiles_x) % tiles_y) * BLOCK_H + (m // BLOCK_W) % BLOCK_H
    z = (tile // (tiles_x * tiles_y)) * BLOCK_D + m // (BLOCK_W * BLOCK_H)
    inside = (x < width) & (y < height) & (z < depth)

    # The unit grid is `a`'s own where STRIDE is 1, and has half its axes where STRIDE is 2. In 2D, depth stays 1.
    STRIDE_Z: tl.constexpr = STRIDE if AXES == 3 else 1
    acc = tl.zeros((BLOCK_D * BLOCK_H * BLOCK_W, BLOCK_CO), tl.float32)
    acc = _accumulate(
        acc, a_ptr + n * stride_an, a_scale_ptr + n * affine_an, a_shift_ptr + n * affine_an, wa_ptr,
        stride_ap, depth * STRIDE_Z, height * STRIDE, width * STRIDE,
        z * STRIDE_Z + pz - 1, y * STRIDE + py - 1, x * STRIDE + px - 1, co, CO,
        KA, TAPS, AXES, BLOCK_K, AFFINE_A, SLOPE, PRECISION,
    )  # fmt: skip
    if KB:
        TAPS_B: tl.constexpr = 8 if AXES == 3 else 4
        acc = _accumulate(
            acc, b_ptr + n * stride_bn, b_scale_ptr + n * affine_bn, b_shift_ptr + n * affine_bn,
            wb_ptr + phase * TAPS_B * KB * CO,
            stride_bp, depth, height, width, z + pz - 1, y + py - 1, x + px - 1, co, CO,
            KB, 2, AXES, BLOCK_K, AFFINE_B, SLOPE, PRECISION,
        )  # fmt: skip

    OUT: tl.constexpr = 2 if PHASED else 1
    OUT_Z: tl.constexpr = OUT if AXES == 3 else 1
    ox, oy, oz = x * OUT + px, y * OUT + py, z * OUT_Z + pz
    if BIAS:
        acc += tl.load(bias_ptr + co, mask=co < CO, other=0.0)[None, :]
    if BORDER:
        row = _border_class(oy, height * OUT) * 3 + _border_class(ox, width * OUT)
        if AXES == 3:
            row += _border_class(oz, depth * OUT_Z) * 9
        acc += tl.load(border_ptr + row[:, None] * CO + co[None, :], mask=(co < CO)[None, :], other=0.0)
    if ACTIVATE:
        acc = _activate(acc, SLOPE)
    pixel = ((oz * height * OUT + oy) * width * OUT + ox).to(tl.int64)
    where = out_ptr + n * stride_on + pixel[:, None] * stride_op + co[None, :]
    mask = inside[:, None] & (co < CO)[None, :]
    if ADD:
        acc += tl.load(where, mask=mask, other=0.0).to(tl.float32)
    result = acc.to(out_ptr.dtype.element_ty)
    tl.store(where, result, mask=mask)
    if STATS:
        _store_statistics(
            result.to(tl.float32), inside, stats_ptr + (n * tl.num_programs(0) + tl.program_id(0)) * 3 * CO, co, CO
        )


@triton.jit
def _border_class(position, size):
    """0 at the first pixel of an axis, 2 at the last, 1 between."""
    return tl.where(position == 0, 0, tl.where(position == size - 1, 2, 1))


@triton.jit
def _store_statistics(value, inside, stats_ptr, co, CO):
    """Count, mean and sum of squared deviations of a tile's pixels for each channel, at stats_ptr [3, CO].

    Around the tile's own mean, so that nothing cancels; tiles are combined later in a fixed order.
    """
    count = tl.sum(inside.to(tl.float32), axis=0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    tl.store(stats_ptr + co, tl.zeros_like(mean) + count, mask=co < CO)
    tl.store(stats_ptr + CO + co, mean, mask=co < CO)
    tl.store(stats_ptr + 2 * CO + co, tl.sum(deviation * deviation, axis=0), mask=co < CO)
