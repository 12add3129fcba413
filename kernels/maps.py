"""What all kernels share: how channels-last maps are cut, checked and passed, and the device functions of their values."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .naive import Affine, accumulator

DTYPES = (torch.float16, torch.bfloat16, torch.float32)  # of maps
# How float32 matrices are multiplied: by three TF32 products, or on AMD, whose matrix cores take float32, by one.
PRODUCTS = tl.constexpr("ieee" if torch.version.hip else "tf32x3")


def power_of_two(size: int) -> int:
    """The least power of two from `size` on; `triton.next_power_of_2` takes ten times as long."""
    return 1 << max(size - 1, 0).bit_length()


def ceil_div(size: int, part: int) -> int:
    """How many parts cover a size; `triton.cdiv` takes ten times as long."""
    return -(-size // part)


Result = TypeVar("Result")
MOST_SHAPES = 4096  # whose arguments are kept


def per_shape(function: Callable[..., Result]) -> Callable[..., Result]:
    """Keeps the results of a function that looks only at shapes, strides, precisions and devices of its tensors.

    It takes tensors and hashable values, by position. Checks that raise are made again.
    """
    known: dict[tuple, Result] = {}

    @functools.wraps(function)
    def kept(*args: object) -> Result:
        key = tuple([(x.shape, x.stride(), x.dtype, x.device) if isinstance(x, Tensor) else x for x in args])
        if key not in known:
            if len(known) >= MOST_SHAPES:
                known.clear()
            known[key] = function(*args)
        return known[key]

    return kept


class Tile(NamedTuple):
    """How maps are cut: elements per tile, programs to aim at where sums are taken, warps per program."""

    elements: int = 2048
    programs: int = 2048
    warps: int = 4

    def blocks(self, pixels: int, channels: int) -> tuple[int, int]:
        """Pixels and channels of a tile."""
        block_c = min(power_of_two(channels), 128)
        return min(power_of_two(pixels), max(1, self.elements // block_c), 1024), block_c

    def chunks(self, images: int, pixels: int, channels: int) -> tuple[int, int]:
        """How many chunks an image is cut into, and the tiles in each: a power of two, so that few kernels are compiled."""
        block_p, block_c = self.blocks(pixels, channels)
        tiles = ceil_div(pixels, block_p)
        aim = max(1, self.programs // (images * ceil_div(channels, block_c)))
        steps = power_of_two(ceil_div(tiles, aim))
        return ceil_div(tiles, steps), steps


@triton.jit
def activate(x, SLOPE: tl.constexpr):
    """Leaky ReLU; ReLU where SLOPE is 0, in one instruction that propagates NaN."""
    if SLOPE == 0.0:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(x >= 0, x, x * SLOPE)


@triton.jit
def load_row(ptr, stride_row, n, c, C):
    """`[1, BLOCK_C]` of image n's row; zero past the last channel."""
    return tl.load(ptr + n * stride_row + c, mask=c < C, other=0.0)[None, :]


@triton.jit
def load_activated(x_ptr, mask, scale, shift, AFFINE: tl.constexpr, SLOPE: tl.constexpr):
    """What a reader of the map sees, rounded to the map's precision."""
    x = tl.load(x_ptr, mask=mask, other=0.0)
    if AFFINE:
        x = activate(x.to(tl.float32) * scale + shift, SLOPE).to(x.dtype)
    return x


@triton.jit
def border_class(position, size):
    """2 at the last pixel of an axis, 0 at the first, 1 between."""
    return tl.where(position == size - 1, 2, tl.where(position == 0, 0, 1))


@triton.jit
def store_statistics(value, inside, stats_ptr, co, CO: tl.constexpr):
    """Count, mean and sum of squared deviations of a tile's pixels for each channel, at stats_ptr [3, CO].

    Deviations are from the tile's mean, so that nothing cancels; tiles are combined later in a fixed order.
    """
    count = tl.sum(inside.to(value.dtype), axis=0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    tl.store(stats_ptr + co, tl.zeros_like(mean) + count, mask=co < CO)
    tl.store(stats_ptr + CO + co, mean, mask=co < CO)
    tl.store(stats_ptr + 2 * CO + co, tl.sum(deviation * deviation, axis=0), mask=co < CO)


def unit_grid(out: Tensor, axes: int, phased: bool) -> tuple[int, int, int]:
    """The sizes of `out`, halved along each axis where output pixels are 2 unit + phase."""
    depth, height, width = out.shape[1:4]
    if axes == 2 and depth != 1:
        raise ValueError(f"a map of two axes has depth 1, not {depth}")
    if not phased:
        return depth, height, width
    if height % 2 or width % 2 or (axes == 3 and depth % 2):
        raise ValueError(f"phases need even sizes, not {tuple(out.shape[1:4])}")
    return depth // 2 if axes == 3 else 1, height // 2, width // 2


def check_dtype(name: str, x: Tensor, float64: bool = False) -> None:
    """Raises TypeError unless x is in one of `DTYPES`; or in float64, which the convolutions take in the interpreter."""
    if x.dtype not in DTYPES and not (float64 and x.dtype == torch.float64):
        raise TypeError(f"{name} is {x.dtype}; the kernels take float16, bfloat16 and float32")


def pixel_stride(name: str, x: Tensor) -> int:
    """The step from pixel to pixel of a map, in elements.

    Raises:
        ValueError: x is not a channels-last `[N, D, H, W, C]`, or its pixels are not evenly spaced.
    """
    shape, strides = tuple(x.shape), x.stride()
    if len(shape) != 5 or (shape[4] > 1 and strides[4] != 1):
        raise ValueError(f"{name} is {shape} with strides {strides}, not a channels-last [N, D, H, W, C]")
    stride, inner = shape[4], 1
    for axis in (3, 2, 1):
        if shape[axis] > 1:
            stride = strides[axis] if inner == 1 else stride
            if (strides[axis] != stride * inner or stride < shape[4]) and x.numel():
                raise ValueError(f"the pixels of {name} are not evenly spaced: {shape}, strides {strides}")
            inner *= shape[axis]
    return stride


def check_map(name: str, x: Tensor, like: Tensor, sizes: tuple[int, ...] | None = None) -> int:
    """Checks a convolution's map: channels-last, of `like`'s batch, precision and device, and of the given sizes.

    Returns:
        Its `pixel_stride`.
    """
    check_dtype(name, x, float64=True)
    if x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device}; maps here are {like.dtype} on {like.device}")
    needed = like.shape[0], *(like.shape[1:4] if sizes is None else sizes)
    if tuple(x.shape[:4]) != needed:
        raise ValueError(f"{name} is {tuple(x.shape[:4])} where {needed} is needed")
    stride = pixel_stride(name, x)
    if x.shape[4] == 0:
        raise ValueError(f"{name} has no channels")
    return stride


def check_vector(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Raises ValueError unless x is contiguous, of `shape`, and in `dtype`; by default, of a sum's precision or float32."""
    if tuple(x.shape) != shape or not x.is_contiguous() or x.device != like.device:
        raise ValueError(f"{name} is contiguous {shape} on {like.device}, not {tuple(x.shape)}, {x.stride()} on {x.device}")
    if x.dtype not in ((dtype,) if dtype else (torch.float32, accumulator(like.dtype))):
        raise ValueError(f"{name} is {x.dtype}; {dtype or accumulator(like.dtype)} is needed")


def check_affine(name: str, affine: Affine | None, x: Tensor) -> None:
    """Raises ValueError unless scale and shift are `[1 or N, C]` of x in the precision of sums, in one layout."""
    for part in affine or ():
        if part.ndim != 2 or part.shape[0] not in (1, x.shape[0]) or part.shape[1] != x.shape[-1]:
            raise ValueError(f"{name} is [1 or {x.shape[0]}, {x.shape[-1]}], not {tuple(part.shape)}")
        if part.stride(1) != 1 and part.shape[1] > 1:
            raise ValueError(f"{name} has its channels {part.stride(1)} apart; they must lie side by side")
        if part.dtype != accumulator(x.dtype) or part.device != x.device:
            raise ValueError(f"{name} is {part.dtype} on {part.device}; {accumulator(x.dtype)} on {x.device} is needed")
    if affine is not None and (affine[0].shape, affine[0].stride()) != (affine[1].shape, affine[1].stride()):
        raise ValueError(
            f"{name}: scale {tuple(affine[0].shape)} and shift {tuple(affine[1].shape)} differ in shape or strides"
        )


def affine_stride(affine: Affine | None) -> int:
    """The step from image to image of a scale and shift: 0 where all images share them."""
    return 0 if affine is None or affine[0].shape[0] == 1 else affine[0].stride(0)


def check_same(name: str, x: Tensor, like: Tensor) -> None:
    """Raises ValueError unless x has the shape and device of `like`."""
    if x.shape != like.shape or x.device != like.device:
        raise ValueError(f"{name} is {tuple(x.shape)} on {x.device}, expected {tuple(like.shape)} on {like.device}")


def map_arguments(**maps: Tensor) -> dict[str, Tensor | int]:
    """What a kernel takes of its maps: of a map x, `x_ptr`, `x_stride_n` and `x_stride_p`. Raises as the checks above."""
    arguments: dict[str, Tensor | int] = {}
    for name, x in maps.items():
        check_dtype(name, x)
        arguments[f"{name}_ptr"] = x
        arguments[f"{name}_stride_n"] = x.stride(0)
        arguments[f"{name}_stride_p"] = pixel_stride(name, x)
    return arguments


def row_arguments(x: Tensor, **rows: Tensor) -> dict[str, Tensor | int]:
    """What a kernel takes of values by channel, `[1 or N, C]` float32 for the map x: of rows r, `r_ptr` and `r_stride`.

    Channels lie side by side; the stride is from one image's row to the next's, 0 where all images share one.
    """
    images, channels = x.shape[0], x.shape[4]
    shapes = (1, channels), (images, channels)
    arguments: dict[str, Tensor | int] = {}
    for name, values in rows.items():
        if values.dtype != torch.float32 or values.device != x.device or values.shape not in shapes:
            raise ValueError(
                f"expected float32 [1 or {images}, {channels}] on {x.device}, "
                f"got {values.dtype} {tuple(values.shape)} on {values.device}"
            )
        values = values if channels == 1 or values.stride(1) == 1 else values.contiguous()
        arguments[f"{name}_ptr"] = values
        arguments[f"{name}_stride"] = values.stride(0) if values.shape[0] > 1 else 0
    return arguments


def affine_arguments(x: Tensor, affine: Affine | None) -> dict[str, Tensor | int]:
    """`row_arguments` of scale and shift; without `affine`, x stands in for pointers that are not read."""
    if affine is None:
        return {"scale_ptr": x, "scale_stride": 0, "shift_ptr": x, "shift_stride": 0}
    return row_arguments(x, scale=affine[0], shift=affine[1])


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Makes x's device the current one: kernels are launched there."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def interpreted(x: Tensor) -> bool:
    """Whether kernels on x run in Triton's interpreter, where a step takes as long for a large tile as for a small one."""
    return not x.is_cuda
