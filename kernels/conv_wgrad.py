"""The gradient of a convolution's weights.

    dW[p, t, k, c] = sum over images and units u of act(a[u + base + t, k]) dy[o(u), c]

    operand                             taps     base     o(u)
    of the size of dy                   3/axis   -1       u
    the low source, of half the size    2/axis   p - 1    2u + p

An implicit GEMM: rows are (tap, channel) pairs, columns output channels, and the sum runs over pixels. Taking rows over
taps lets 32 channels fill a tile of 128 rows, four taps of which share each load of dy. Pixels are split over programs;
each writes its sum to a separate buffer, and the buffers are added in a fixed order.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scratch
from .conv import NARROW_OFFSETS
from .conv_configs import block_of_outputs, block_of_pixels, interpreted_tile, tile_counts
from .jit import kernel
from .maps import (
    activate,
    affine_stride,
    ceil_div,
    check_affine,
    check_map,
    device_of,
    interpreted,
    per_shape,
    power_of_two,
    unit_grid,
)
from .naive import Affine, accumulator, dot_precision

MOST_WAVES = 8  # of programs: it bounds the memory of their sums


@dataclasses.dataclass(frozen=True)
class WgradConfig:
    """A tile of units per step, and block_m (tap, channel) rows by block_co channels per program.

    programs: how many a multiprocessor of sm_90 holds at once, by their registers and shared memory.
    """

    block_d: int
    block_h: int
    block_w: int
    block_m: int
    block_co: int
    num_warps: int
    num_stages: int
    programs: int = 2

    @property
    def pixels(self) -> int:
        return self.block_d * self.block_h * self.block_w


@triton.jit
def _next_tile(x, y, z, n, depth, height, width, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """The tile after the one at (x, y, z) of image n: along W first, then H, D and the images."""
    x += BLOCK_W
    y += tl.where(x >= width, BLOCK_H, 0)
    x = tl.where(x >= width, 0, x)
    z += tl.where(y >= height, BLOCK_D, 0)
    y = tl.where(y >= height, 0, y)
    n += tl.where(z >= depth, 1, 0)
    return x, y, tl.where(z >= depth, 0, z), n


@kernel
def _conv_wgrad_kernel(
    a_ptr, scale_ptr, shift_ptr, a_stride_n, a_stride_p, affine_stride, dy_ptr, dy_stride_n, dy_stride_p, partial_ptr,
    depth, height, width, tiles_z, tiles_y, tiles_x, images, steps,
    K: tl.constexpr, CO: tl.constexpr, PHASED: tl.constexpr, AXES: tl.constexpr, SLOPE: tl.constexpr,
    PLAIN: tl.constexpr, PER_IMAGE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_CO: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """partial [splits, phases, TAPS^AXES K, CO]: one block of rows and columns, over `steps` tiles in the images' order.

    The tile's position is carried from step to step: dividing its index by the sizes would cost more than the loads.
    """
    TAPS: tl.constexpr = 2 if PHASED else 3
    ROWS: tl.constexpr = (TAPS * TAPS * TAPS if AXES == 3 else TAPS * TAPS) * K
    PHASES: tl.constexpr = (8 if AXES == 3 else 4) if PHASED else 1
    OUT: tl.constexpr = 2 if PHASED else 1
    OUT_Z: tl.constexpr = OUT if AXES == 3 else 1
    CO_BLOCKS: tl.constexpr = (CO + BLOCK_CO - 1) // BLOCK_CO
    ROW_BLOCKS: tl.constexpr = (ROWS + BLOCK_M - 1) // BLOCK_M
    part = tl.program_id(0) // (CO_BLOCKS * ROW_BLOCKS)
    co = tl.program_id(0) % CO_BLOCKS * BLOCK_CO + tl.arange(0, BLOCK_CO)
    row = tl.program_id(0) // CO_BLOCKS % ROW_BLOCKS * BLOCK_M + tl.arange(0, BLOCK_M)
    split, phase = part // PHASES, part % PHASES
    pz, py, px = phase // 4, phase // 2 % 2, phase % 2

    m = tl.arange(0, BLOCK_D * BLOCK_H * BLOCK_W)
    unit_z, unit_y, unit_x = m // (BLOCK_W * BLOCK_H), m // BLOCK_W % BLOCK_H, m % BLOCK_W
    tap, k = row // K, row % K
    # Rows past the end are sampled far outside every map, so that one comparison masks them too.
    sample_x = unit_x[None, :] + (tl.where(row < ROWS, tap % TAPS, 1 << 30) + px - 1)[:, None]
    sample_y = unit_y[None, :] + (tap // TAPS % TAPS + py - 1)[:, None]
    from_a = (tap // TAPS % TAPS + py - 1) * width + tap % TAPS + px - 1
    rows_a = unit_y * width + unit_x
    rows_y = (unit_y * OUT * width + unit_x) * OUT
    if AXES == 3:
        sample_z = unit_z[None, :] + (tap // (TAPS * TAPS) + pz - 1)[:, None]
        from_a += (tap // (TAPS * TAPS) + pz - 1) * height * width
        rows_a += unit_z * height * width
        rows_y += unit_z * OUT_Z * height * OUT * width * OUT
    if WIDE:
        from_a, rows_a, rows_y = from_a.to(tl.int64), rows_a.to(tl.int64), rows_y.to(tl.int64)
    offsets_a = (from_a * a_stride_p + k)[:, None] + (rows_a * a_stride_p)[None, :]
    offsets_y = (rows_y * dy_stride_p)[:, None] + co[None, :]

    SUM: tl.constexpr = partial_ptr.dtype.element_ty
    if scale_ptr is not None:
        scale, shift = tl.load(scale_ptr + k), tl.load(shift_ptr + k)
    first = split * steps
    x = first % tiles_x * BLOCK_W
    y = first // tiles_x % tiles_y * BLOCK_H
    z = first // (tiles_x * tiles_y) % tiles_z * BLOCK_D
    n = first // (tiles_x * tiles_y) // tiles_z
    acc = tl.zeros((BLOCK_M, BLOCK_CO), SUM)
    for _ in range(steps):
        image, plane = n.to(tl.int64), z.to(tl.int64) * height
        end = tl.where(n < images, width, 0)  # past the last image nothing is inside
        inside = (x + sample_x >= 0) & (x + sample_x < end) & (y + sample_y >= 0) & (y + sample_y < height)
        inside_y = (x + unit_x < end) & (y + unit_y < height)
        if AXES == 3:
            inside = inside & (z + sample_z >= 0) & (z + sample_z < depth)
            inside_y = inside_y & (z + unit_z < depth)
        start = image * a_stride_n + ((plane + y) * width + x) * a_stride_p
        value = tl.load(a_ptr + start + offsets_a, mask=inside, other=0.0)
        if scale_ptr is not None:
            if PER_IMAGE:
                scale, shift = tl.load(scale_ptr + n * affine_stride + k), tl.load(shift_ptr + n * affine_stride + k)
            raw = value.to(SUM) * scale[:, None] + shift[:, None]
            seen = activate(raw, SLOPE)
            if PLAIN:
                seen = tl.where((k < PLAIN)[:, None], value.to(SUM), seen)
            value = tl.where(inside, seen, 0.0).to(value.dtype)
        start = (((plane * OUT_Z + pz * height) * OUT + y * OUT + py) * (width * OUT) + x * OUT + px) * dy_stride_p
        mask = inside_y[:, None]
        if CO % BLOCK_CO:
            mask = mask & (co < CO)[None, :]
        gradient = tl.load(dy_ptr + (image * dy_stride_n + start) + offsets_y, mask=mask, other=0.0)
        acc = tl.dot(value, gradient, acc, input_precision=PRECISION, out_dtype=SUM)
        x, y, z, n = _next_tile(x, y, z, n, depth, height, width, BLOCK_D, BLOCK_H, BLOCK_W)

    where = partial_ptr + part.to(tl.int64) * (ROWS * CO) + (row[:, None] * CO + co[None, :])
    tl.store(where, acc, mask=(row < ROWS)[:, None] & (co < CO)[None, :])


def conv_wgrad(
    a: Tensor,
    dy: Tensor,
    *,
    axes: int,
    phased: bool = False,
    affine: Affine | None = None,
    slope: float = 0.0,
    plain: int = 0,
    config: WgradConfig | None = None,
) -> Tensor:
    """`naive.conv_wgrad`: `[1, 3^axes, K, CO]`, or `[2^axes, 2^axes, K, CO]` for the low source with `phased`."""
    scale, shift = affine or (None, None)
    arguments = _arguments(
        a, dy, axes, phased, scale, shift, float(slope), plain, config, interpreted(a), dot_precision(a.dtype)
    )
    dtype = accumulator(a.dtype)
    if dy.numel() == 0:
        return a.new_zeros(arguments.shape[1:], dtype=dtype)
    is_summed = arguments.shape[0] > 1 and dtype == torch.float32
    partial = scratch.empty(a, *arguments.shape) if is_summed else a.new_empty(arguments.shape, dtype=dtype)
    with device_of(a):
        _conv_wgrad_kernel[arguments.grid](
            a_ptr=a, scale_ptr=scale, shift_ptr=shift, dy_ptr=dy, partial_ptr=partial, **arguments.rest
        )
    return partial[0] if len(partial) == 1 else partial.sum(0)


class Arguments(NamedTuple):
    """What a launch takes besides tensors: its grid, the shape of the partial sums, and the kernel's other arguments."""

    grid: tuple[int, ...]
    shape: tuple[int, ...]
    rest: dict[str, int | float | bool | str]


@per_shape
def _arguments(
    a: Tensor, dy: Tensor, axes: int, phased: bool, scale: Tensor | None, shift: Tensor | None, slope: float, plain: int,
    config: WgradConfig | None, interpreted: bool, precision: str,
) -> Arguments:  # fmt: skip
    """Checks a call of `conv_wgrad` and computes its arguments."""
    if axes not in (2, 3):
        raise ValueError(f"axes is 2 or 3, not {axes}")
    affine = None if scale is None else (scale, shift)
    units = depth, height, width = unit_grid(dy, axes, phased)
    dy_stride = check_map("dy", dy, dy)
    a_stride = check_map("a", a, dy, units)
    check_affine("affine", affine, a)
    k, co = a.shape[-1], dy.shape[-1]
    count, taps = (2**axes, 2**axes) if phased else (1, 3**axes)
    if config is None:
        config = default_config(units, k, co, axes, phased, a.dtype, interpreted)
    tiles_z, tiles_y, tiles_x = tile_counts(units, config)
    tiles = a.shape[0] * tiles_z * tiles_y * tiles_x
    programs = count * ceil_div(taps * k, config.block_m) * ceil_div(co, config.block_co)
    steps = steps_of(tiles, programs, config.programs * multiprocessors(a.device), config.pixels)
    splits = ceil_div(tiles, steps)
    strides = {
        "a_stride_n": a.stride(0), "a_stride_p": a_stride, "affine_stride": affine_stride(affine),
        "dy_stride_n": dy.stride(0), "dy_stride_p": dy_stride,
    }  # fmt: skip
    geometry = {
        "depth": depth, "height": height, "width": width, "tiles_z": tiles_z, "tiles_y": tiles_y, "tiles_x": tiles_x,
        "images": a.shape[0], "steps": steps, "K": k, "CO": co, "PHASED": phased, "AXES": axes,
    }  # fmt: skip
    blocks = {
        "BLOCK_D": config.block_d, "BLOCK_H": config.block_h, "BLOCK_W": config.block_w, "BLOCK_M": config.block_m,
        "BLOCK_CO": config.block_co, "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    span = (config.block_d + 2) * height * width * max(a_stride, (2**axes if phased else 1) * dy_stride)
    per_image, is_wide = strides["affine_stride"] != 0, span >= NARROW_OFFSETS
    plain = 0 if affine is None else plain
    options: dict[str, Any] = {
        "SLOPE": slope,
        "PLAIN": plain,
        "PER_IMAGE": per_image,
        "PRECISION": precision,
        "WIDE": is_wide,
    }
    return Arguments((programs * splits,), (splits, count, taps, k, co), {**strides, **geometry, **options, **blocks})


def steps_of(tiles: int, programs: int, at_once: int, pixels: int) -> int:
    """Tiles of a program, where `programs` of them share each split of all tiles, for the least time of a GPU that runs
    `at_once` programs together.

    It runs them in waves, and a last wave of few programs takes as long as a full one. Each program also writes a sum that
    is read again: at an H100's 3.35 TB/s that takes as long as 700 pixels of products.
    """
    most = max(1, min(tiles, ceil_div(MOST_WAVES * at_once, programs)))
    own = ceil_div(700, pixels)
    splits = min(range(1, most + 1), key=lambda count: ceil_div(programs * count, at_once) * (ceil_div(tiles, count) + own))
    return max(1, ceil_div(tiles, splits))


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; meta tensors stand for those on the current one, or on an H100. The interpreter is taken for one."""
    if device.type == "meta":
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 132 if device.type == "meta" else 1


def configs(units: tuple[int, int, int], k: int, co: int, axes: int, phased: bool, dtype: torch.dtype) -> list[WgradConfig]:
    """The configurations worth timing; the first is the default.

    A step loads (block_m + block_co) pixels values for 2 block_m block_co pixels flops, as the forward kernel's does.
    """
    rows = (2 if phased else 3) ** axes * k
    block_co = block_of_outputs(co)
    if dot_precision(dtype) == "ieee" and dtype in (torch.float32, torch.float64):
        shapes = [(64, min(block_co, 32), 16, 4, 2, 2)]
    else:
        shapes = {
            32: [(128, 32, 64, 4, 3, 2), (128, 32, 64, 8, 3, 2), (128, 32, 32, 4, 1, 4)][axes == 3 :],  # 4 warps spill in 3D
            64: [(128, 64, 64, 8, 3, 2), (128, 64, 32, 4, 3, 3)],
            128: [(128, 128, 32, 8, 3, 2), (128, 128, 64, 8, 3, 1)],
        }[max(block_co, 32)]
    offered = []
    for block_m, block, pixels, warps, stages, programs in shapes:
        # Half as many pixels of float32 fill the same bytes.
        tile = block_of_pixels(units, max(16, pixels // 2) if dtype.itemsize > 2 else pixels, axes)
        block_m = min(block_m, max(16, power_of_two(rows)))
        offered.append(WgradConfig(*tile, block_m, min(block, block_co), warps, stages, programs))
    return list(dict.fromkeys(offered))


def default_config(
    units: tuple[int, int, int], k: int, co: int, axes: int, phased: bool, dtype: torch.dtype, interpreted: bool
) -> WgradConfig:
    """As `conv_configs.default_config`."""
    if not interpreted:
        return configs(units, k, co, axes, phased, dtype)[0]
    block_m = min(512, power_of_two((2 if phased else 3) ** axes * k))
    block_co = min(128, power_of_two(co))
    block_d, block_h, block_w = interpreted_tile(units, (8, 32, 32), max(block_m, block_co))
    return WgradConfig(block_d, block_h, block_w, block_m, block_co, 4, 1, programs=8)
