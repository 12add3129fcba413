"""Convolutions over a prefix and a low source that are never concatenated or up-sampled.

    out[o] = epilogue( sum_t act(a[o + t]) Wa[t]  +  sum_t act(b[u + t]) Wb[p, t]  +  bias )      o = 2u + p

`a` is the leading channels of a level buffer (the prefix: one operand however many nodes it holds), `b` a slice of the
level below, read at its own resolution: output pixel 2u + p of conv3(up2(b)) is a 2-tap convolution whose weights
depend only on the phase p. Every tensor is channels-last, `[N, D, H, W, C]` with D = 1 in 2D.

One kernel serves all uses. An operand is sampled at `stride * unit + base + t`, t = 0..taps-1 on each axis:

    use                              unit grid   a: taps, stride, base    b: taps, stride, base
    convolution, no low source       output      3, 1, -1                 none, or 3, 1, -1 (bilinear: up-sampled before)
    convolution with low source      low level   3, 2, p - 1              2, 1, p - 1
    data gradient of the prefix      output      3, 1, -1 (flipped W)     none
    data gradient of the low source  low level   4, 2, -1                 none
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from . import scratch
from .conv_configs import Config, block_of_channels, default_config, tile_counts
from .conv_sums import accumulate
from .jit import kernel
from .maps import (
    activate,
    affine_stride,
    border_class,
    ceil_div,
    check_affine,
    check_map,
    check_vector,
    device_of,
    interpreted,
    per_shape,
    pixel_stride,
    store_statistics,
    unit_grid,
)
from .naive import Affine, dot_precision

NARROW_OFFSETS = 2**31  # offsets within a tile are 32-bit below


@kernel
def _conv_kernel(
    a_ptr, a_scale_ptr, a_shift_ptr, a_weight_ptr, a_stride_n, a_stride_p, a_affine_stride,
    b_ptr, b_scale_ptr, b_shift_ptr, b_weight_ptr, b_stride_n, b_stride_p, b_affine_stride,
    bias_ptr, border_ptr, out_ptr, out_stride_n, out_stride_p, stats_ptr,
    depth, height, width, tiles_z, tiles_y, tiles_x,
    KA: tl.constexpr, PLAIN: tl.constexpr, KB: tl.constexpr, CO: tl.constexpr, TAPS: tl.constexpr, STRIDE: tl.constexpr,
    PHASED: tl.constexpr, AXES: tl.constexpr, SLOPE: tl.constexpr, ACTIVATE: tl.constexpr, ADD: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_KA: tl.constexpr, BLOCK_KB: tl.constexpr,
    BLOCK_CO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A program computes one tile of units, one phase, one block of output channels. depth, height, width: of the unit grid.

    Blocks of channels vary fastest, then phases, then tiles: programs that run together share a tile of `a` and `b`.
    """
    PHASES: tl.constexpr = (8 if AXES == 3 else 4) if PHASED else 1
    CO_BLOCKS: tl.constexpr = (CO + BLOCK_CO - 1) // BLOCK_CO
    part = tl.program_id(0) // CO_BLOCKS
    co = (tl.program_id(0) % CO_BLOCKS) * BLOCK_CO + tl.arange(0, BLOCK_CO)
    tile, phase = part // PHASES, part % PHASES
    pz, py, px = phase // 4, phase // 2 % 2, phase % 2
    tile_x = tile % tiles_x * BLOCK_W
    tile_y = tile // tiles_x % tiles_y * BLOCK_H
    tile_z = tile // (tiles_x * tiles_y) % tiles_z * BLOCK_D
    n = (tile // (tiles_x * tiles_y) // tiles_z).to(tl.int64)
    m = tl.arange(0, BLOCK_D * BLOCK_H * BLOCK_W)
    unit_z, unit_y, unit_x = m // (BLOCK_W * BLOCK_H), m // BLOCK_W % BLOCK_H, m % BLOCK_W

    # Sums over float64 maps are in float64. In 2D, depth stays 1.
    SUM: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    STRIDE_Z: tl.constexpr = STRIDE if AXES == 3 else 1
    acc = tl.zeros((BLOCK_D * BLOCK_H * BLOCK_W, BLOCK_CO), SUM)
    if KA:
        acc = accumulate(
            acc, x_ptr=a_ptr + n * a_stride_n,
            scale_ptr=None if a_scale_ptr is None else a_scale_ptr + n * a_affine_stride,
            shift_ptr=None if a_shift_ptr is None else a_shift_ptr + n * a_affine_stride,
            w_ptr=a_weight_ptr, stride_p=a_stride_p,
            depth=depth * STRIDE_Z, height=height * STRIDE, width=width * STRIDE,
            tile_z=tile_z * STRIDE_Z + pz - 1, tile_y=tile_y * STRIDE + py - 1, tile_x=tile_x * STRIDE + px - 1,
            unit_z=unit_z, unit_y=unit_y, unit_x=unit_x, co=co, K=KA, PLAIN=PLAIN, CO=CO, TAPS=TAPS, STRIDE=STRIDE,
            AXES=AXES, BLOCK_K=BLOCK_KA, BLOCK_CO=BLOCK_CO, SLOPE=SLOPE, PRECISION=PRECISION, WIDE=WIDE,
        )  # fmt: skip
    if KB:
        TAPS_B: tl.constexpr = 2 if PHASED else 3
        WEIGHTS: tl.constexpr = (TAPS_B * TAPS_B * TAPS_B if AXES == 3 else TAPS_B * TAPS_B) * KB * CO
        acc = accumulate(
            acc, x_ptr=b_ptr + n * b_stride_n,
            scale_ptr=None if b_scale_ptr is None else b_scale_ptr + n * b_affine_stride,
            shift_ptr=None if b_shift_ptr is None else b_shift_ptr + n * b_affine_stride,
            w_ptr=b_weight_ptr + phase * WEIGHTS, stride_p=b_stride_p,
            depth=depth, height=height, width=width, tile_z=tile_z + pz - 1, tile_y=tile_y + py - 1, tile_x=tile_x + px - 1,
            unit_z=unit_z, unit_y=unit_y, unit_x=unit_x, co=co, K=KB, PLAIN=0, CO=CO, TAPS=TAPS_B, STRIDE=1, AXES=AXES,
            BLOCK_K=BLOCK_KB, BLOCK_CO=BLOCK_CO, SLOPE=SLOPE, PRECISION=PRECISION, WIDE=WIDE,
        )  # fmt: skip

    OUT: tl.constexpr = 2 if PHASED else 1
    OUT_Z: tl.constexpr = OUT if AXES == 3 else 1
    x, y, z = tile_x + unit_x, tile_y + unit_y, tile_z + unit_z
    inside = (x < width) & (y < height) & (z < depth)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + co, mask=co < CO, other=0.0)[None, :]
    if border_ptr is not None:
        row = border_class(y * OUT + py, height * OUT) * 3 + border_class(x * OUT + px, width * OUT)
        if AXES == 3:
            row += border_class(z * OUT_Z + pz, depth * OUT_Z) * 9
        acc += tl.load(border_ptr + row[:, None] * CO + co[None, :], mask=(co < CO)[None, :], other=0.0)
    if ACTIVATE:
        acc = activate(acc, SLOPE)
    first = ((tile_z.to(tl.int64) * OUT_Z + pz) * height * OUT + tile_y * OUT + py) * width * OUT + tile_x * OUT + px
    rows = ((unit_z * OUT_Z * height * OUT + unit_y * OUT) * width + unit_x) * OUT
    if WIDE:
        rows = rows.to(tl.int64)
    where = out_ptr + (n * out_stride_n + first * out_stride_p) + ((rows * out_stride_p)[:, None] + co[None, :])
    mask = inside[:, None] & (co < CO)[None, :]
    if ADD:
        acc += tl.load(where, mask=mask, other=0.0).to(SUM)
    result = acc.to(out_ptr.dtype.element_ty)
    tl.store(where, result, mask=mask)
    if stats_ptr is not None:
        store_statistics(result.to(SUM), inside, stats_ptr + part.to(tl.int64) * 3 * CO, co, CO)


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
    slope: float = 0.0,
    plain: int = 0,
    bias: Tensor | None = None,
    border: Tensor | None = None,
    act: bool = False,
    add: bool = False,
    stats: bool = False,
    config: Config | None = None,
) -> Tensor | None:
    """`naive.conv` in one kernel. Statistics come as `[N, T, 3, CO]`, one of T parts per tile and phase."""
    a_scale, a_shift = affine_a or (None, None)
    b_scale, b_shift = affine_b or (None, None)
    arguments = _arguments(
        out, a, wa, axes, taps, stride, phased, a_scale, a_shift, b, wb, b_scale, b_shift, bias, border,
        float(slope), plain, act, add, config, interpreted(out), dot_precision(out.dtype),
    )  # fmt: skip
    partial = empty_statistics(out, arguments.parts) if stats else None
    if out.numel() == 0:
        return partial
    with device_of(out):
        _conv_kernel[arguments.grid](
            a_ptr=a, a_scale_ptr=a_scale, a_shift_ptr=a_shift, a_weight_ptr=wa,
            b_ptr=b, b_scale_ptr=b_scale, b_shift_ptr=b_shift, b_weight_ptr=wb,
            bias_ptr=bias, border_ptr=border, out_ptr=out, stats_ptr=partial, **arguments.rest,
        )  # fmt: skip
    return partial


class Arguments(NamedTuple):
    """What a launch takes besides tensors: its grid, the parts of an image's statistics, the kernel's other arguments."""

    grid: tuple[int, ...]
    parts: int
    rest: dict[str, int | float | bool | str]


@per_shape
def _arguments(
    out: Tensor, a: Tensor, wa: Tensor, axes: int, taps: int, stride: int, phased: bool,
    a_scale: Tensor | None, a_shift: Tensor | None, b: Tensor | None, wb: Tensor | None,
    b_scale: Tensor | None, b_shift: Tensor | None, bias: Tensor | None, border: Tensor | None,
    slope: float, plain: int, act: bool, add: bool, config: Config | None, interpreted: bool, precision: str,
) -> Arguments:  # fmt: skip
    """Checks a call of `conv` and computes its arguments."""
    affine_a = None if a_scale is None else (a_scale, a_shift)
    affine_b = None if b_scale is None else (b_scale, b_shift)
    check_call(
        out, a, wa, axes=axes, taps=taps, stride=stride, phased=phased, affine_a=affine_a, b=b, wb=wb, affine_b=affine_b,
        bias=bias, border=border,
    )  # fmt: skip
    ka, kb, co = a.shape[-1], 0 if b is None else b.shape[-1], out.shape[-1]
    units = depth, height, width = unit_grid(out, axes, phased)
    if config is None:
        config = default_config(units, out.shape[0], max(ka, kb), co, axes, phased, a.dtype, interpreted)
    tiles_z, tiles_y, tiles_x = tile_counts(units, config)
    parts = tiles_z * tiles_y * tiles_x * (2**axes if phased else 1)
    # Without one as for the other: configurations that differ in nothing else are then one kernel.
    block_ka, block_kb = (block_of_channels(count, config.block_k) for count in (ka or kb, kb or ka))
    strides = {
        "a_stride_n": a.stride(0), "a_stride_p": pixel_stride("a", a), "a_affine_stride": affine_stride(affine_a),
        "b_stride_n": 0 if b is None else b.stride(0), "b_stride_p": 0 if b is None else pixel_stride("b", b),
        "b_affine_stride": affine_stride(affine_b), "out_stride_n": out.stride(0), "out_stride_p": pixel_stride("out", out),
    }  # fmt: skip
    geometry = {
        "depth": depth, "height": height, "width": width, "tiles_z": tiles_z, "tiles_y": tiles_y, "tiles_x": tiles_x,
        "KA": ka, "PLAIN": plain if affine_a else 0, "KB": kb, "CO": co, "TAPS": taps, "STRIDE": stride, "PHASED": phased,
        "AXES": axes,
    }  # fmt: skip
    blocks = {
        "BLOCK_D": config.block_d, "BLOCK_H": config.block_h, "BLOCK_W": config.block_w, "BLOCK_KA": block_ka,
        "BLOCK_KB": block_kb, "BLOCK_CO": config.block_co, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    reach = (2 if stride == 2 or phased else 1) ** axes
    widest = max(strides[f"{name}_stride_p"] for name in ("out", "a", "b"))
    is_wide = config.block_d * height * width * reach * widest >= NARROW_OFFSETS
    options = {"SLOPE": slope, "ACTIVATE": act, "ADD": add, "PRECISION": precision, "WIDE": is_wide}
    grid = (out.shape[0] * parts * ceil_div(co, config.block_co),)
    return Arguments(grid, parts, {**strides, **geometry, **options, **blocks})


def empty_statistics(out: Tensor, parts: int) -> Tensor:
    """Room for the statistics `[N, parts, 3, CO]` of a convolution's result."""
    shape = out.shape[0], parts, 3, out.shape[-1]
    return out.new_empty(shape, dtype=torch.float64) if out.dtype == torch.float64 else scratch.empty(out, *shape)


def check_call(
    out: Tensor,
    a: Tensor,
    wa: Tensor,
    *,
    axes: int,
    taps: int,
    stride: int,
    phased: bool,
    affine_a: Affine | None,
    b: Tensor | None,
    wb: Tensor | None,
    affine_b: Affine | None,
    bias: Tensor | None,
    border: Tensor | None,
) -> None:
    """Checks that the operands of a call of `conv` fit one another.

    Raises:
        TypeError: maps of a precision that the kernels do not take.
        ValueError: anything else that does not fit.
    """
    if axes not in (2, 3):
        raise ValueError(f"axes is 2 or 3, not {axes}")
    if taps not in (2, 3, 4) or stride not in (1, 2):
        raise ValueError(f"taps is 2, 3 or 4 and stride 1 or 2, not {taps} and {stride}")
    co, units = out.shape[-1], unit_grid(out, axes, phased)
    check_map("out", out, out)
    if a.shape[-1] or b is None:
        check_map("a", a, out, tuple(u * stride if k + axes >= 3 else u for k, u in enumerate(units)))
    check_vector("wa", wa, (taps**axes, a.shape[-1], co), out, out.dtype)
    check_affine("affine_a", affine_a, a)
    if (b is None) != (wb is None):
        raise ValueError("b and wb come together")
    if b is not None:
        check_map("b", b, out, units)
        count, taps_b = (2**axes, 2) if phased else (1, 3)
        check_vector("wb", wb, (count, taps_b**axes, b.shape[-1], co), out, out.dtype)
        check_affine("affine_b", affine_b, b)
    if bias is not None:
        check_vector("bias", bias, (co,), out)
    if border is not None:
        check_vector("border", border, (3**axes, co), out)
