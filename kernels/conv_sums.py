"""The products of a convolution, summed on the device: `kernels/conv.py` calls `accumulate` for each of its operands."""

from __future__ import annotations

import triton
import triton.language as tl

from .maps import activate

FEW = tl.constexpr(4)  # channels up to which a product's rows are taken over taps


@triton.jit
def _inside_bits(z, y, x, depth, height, width, TAPS: tl.constexpr, AXES: tl.constexpr):
    """Bit t of [M] is set where the sample of tap t, at (z, y, x) + t, lies inside the map.

    Computed once, so that the loop spends one instruction per pixel on padding instead of two comparisons per axis.
    """
    BITS: tl.constexpr = tl.int64 if AXES == 3 and TAPS > 3 else tl.int32
    columns = tl.zeros_like(x).to(BITS)
    for t in tl.static_range(TAPS):
        columns |= ((x + t >= 0) & (x + t < width)).to(BITS) << t
    bits = tl.zeros_like(columns)
    for t in tl.static_range(TAPS):
        bits |= tl.where((y + t >= 0) & (y + t < height), columns << (TAPS * t), 0)
    if AXES == 3:
        planes = bits
        bits = tl.zeros_like(columns)
        for t in tl.static_range(TAPS):
            bits |= tl.where((z + t >= 0) & (z + t < depth), planes << (TAPS * TAPS * t), 0)
    return bits


@triton.jit
def _accumulate_many(
    acc, x_ptr, scale_ptr, shift_ptr, w_ptr, stride_p, depth, height, width,
    tile_z, tile_y, tile_x, unit_z, unit_y, unit_x, co,
    K: tl.constexpr, PLAIN: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, AXES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc [M, CO] += sum over taps t and channels k of act(x[tile + STRIDE unit + t, k] scale + shift) w[t, k, co].

    The first PLAIN channels are read as they are.
    x_ptr, scale_ptr and shift_ptr point at the image's first element; w: [TAPS^AXES, K, CO]; tile: scalars, the sample of
    the tile's first unit; unit: [M]. What depends on the pixel, an offset and the bits, is computed before the loop; a
    step only adds scalars. The padding is zero after norm and activation, so the mask is applied after them. All taps of a
    block of channels follow one another, so that loads that go through L1 find most of their pixels there.
    """
    K_STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TAP_STEPS: tl.constexpr = TAPS * TAPS * TAPS if AXES == 3 else TAPS * TAPS
    lanes = tl.arange(0, BLOCK_K)
    rows = unit_y * STRIDE * width + unit_x * STRIDE
    first = (tile_y.to(tl.int64) * width + tile_x) * stride_p
    if AXES == 3:
        rows += unit_z * STRIDE * height * width
        first += tile_z.to(tl.int64) * height * width * stride_p
    if WIDE:
        rows = rows.to(tl.int64)
    offsets = (rows * stride_p)[:, None] + lanes[None, :]
    weights = lanes[:, None] * CO + co[None, :]
    bits = _inside_bits(
        tile_z + unit_z * STRIDE, tile_y + unit_y * STRIDE, tile_x + unit_x * STRIDE, depth, height, width, TAPS, AXES
    )
    for step in range(TAP_STEPS * K_STEPS):
        tap = step % TAP_STEPS
        k = (step // TAP_STEPS) * BLOCK_K
        moved = (tap // TAPS % TAPS) * width + tap % TAPS
        if AXES == 3:
            moved += tap // (TAPS * TAPS) * height * width
        inside = (((bits >> tap) & 1) != 0)[:, None]
        mask = inside
        if K % BLOCK_K:
            mask = inside & (k + lanes < K)[None, :]
        value = tl.load(x_ptr + (first + moved.to(tl.int64) * stride_p + k) + offsets, mask=mask, other=0.0)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + k + lanes, mask=k + lanes < K, other=0.0)[None, :]
            shift = tl.load(shift_ptr + k + lanes, mask=k + lanes < K, other=0.0)[None, :]
            seen = activate(value.to(acc.dtype) * scale + shift, SLOPE)
            if PLAIN:
                seen = tl.where((k + lanes < PLAIN)[None, :], value.to(acc.dtype), seen)
            value = tl.where(inside, seen, 0.0).to(value.dtype)
        from_ptr = w_ptr + (tap * K + k) * CO + weights
        if K % BLOCK_K or CO % BLOCK_CO:
            weight = tl.load(from_ptr, mask=(k + lanes < K)[:, None] & (co < CO)[None, :], other=0.0)
        else:
            weight = tl.load(from_ptr)
        acc = tl.dot(value, weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def _accumulate_few(
    acc, x_ptr, scale_ptr, shift_ptr, w_ptr, stride_p, depth, height, width,
    tile_z, tile_y, tile_x, unit_z, unit_y, unit_x, co,
    K: tl.constexpr, PLAIN: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, AXES: tl.constexpr,
    BLOCK_K: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """As `_accumulate_many`, for maps of few channels: a step takes BLOCK_K rows (tap, channel) of the weights.

    The nine taps of an image's one channel are one product of 16 rows in place of nine, each of 15 rows of zeros.
    """
    ROWS: tl.constexpr = (TAPS * TAPS * TAPS if AXES == 3 else TAPS * TAPS) * K
    rows = unit_y * STRIDE * width + unit_x * STRIDE
    first = (tile_y.to(tl.int64) * width + tile_x) * stride_p
    if AXES == 3:
        rows += unit_z * STRIDE * height * width
        first += tile_z.to(tl.int64) * height * width * stride_p
    if WIDE:
        rows = rows.to(tl.int64)
    bits = _inside_bits(
        tile_z + unit_z * STRIDE, tile_y + unit_y * STRIDE, tile_x + unit_x * STRIDE, depth, height, width, TAPS, AXES
    )
    for step in range((ROWS + BLOCK_K - 1) // BLOCK_K):
        row = step * BLOCK_K + tl.arange(0, BLOCK_K)
        tap, k = row // K, row % K
        moved = tap // TAPS % TAPS * width + tap % TAPS
        if AXES == 3:
            moved += tap // (TAPS * TAPS) * height * width
        inside = ((bits[:, None] >> tap[None, :]) & 1) != 0  # no tap past the last one is
        from_x = (x_ptr + first + moved.to(tl.int64) * stride_p + k)[None, :] + (rows * stride_p)[:, None]
        value = tl.load(from_x, mask=inside, other=0.0)
        if scale_ptr is not None:
            seen = activate(value.to(acc.dtype) * tl.load(scale_ptr + k)[None, :] + tl.load(shift_ptr + k)[None, :], SLOPE)
            if PLAIN:
                seen = tl.where((k < PLAIN)[None, :], value.to(acc.dtype), seen)
            value = tl.where(inside, seen, 0.0).to(value.dtype)
        weight = tl.load(w_ptr + row[:, None] * CO + co[None, :], mask=(row < ROWS)[:, None] & (co < CO)[None, :], other=0.0)
        acc = tl.dot(value, weight, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    return acc


@triton.jit
def accumulate(
    acc, x_ptr, scale_ptr, shift_ptr, w_ptr, stride_p, depth, height, width,
    tile_z, tile_y, tile_x, unit_z, unit_y, unit_x, co,
    K: tl.constexpr, PLAIN: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr, AXES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_CO: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """acc [M, CO] plus the products of one operand, by the loop for its number of channels."""
    if K <= FEW:
        return _accumulate_few(
            acc, x_ptr, scale_ptr, shift_ptr, w_ptr, stride_p, depth, height, width, tile_z, tile_y, tile_x,
            unit_z, unit_y, unit_x, co, K, PLAIN, CO, TAPS, STRIDE, AXES, BLOCK_K, SLOPE, PRECISION, WIDE,
        )  # fmt: skip
    else:
        return _accumulate_many(
            acc, x_ptr, scale_ptr, shift_ptr, w_ptr, stride_p, depth, height, width, tile_z, tile_y, tile_x,
            unit_z, unit_y, unit_x, co, K, PLAIN, CO, TAPS, STRIDE, AXES, BLOCK_K, BLOCK_CO, SLOPE, PRECISION, WIDE,
        )  # fmt: skip
