"""What the launchers of all kernels share: channels-last maps, the checks of their arguments, the activation."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

Affine = tuple[Tensor, Tensor]
MAP_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@triton.jit
def activate(x, SLOPE: tl.constexpr):
    """Leaky ReLU; ReLU where SLOPE is 0, then one instruction that lets NaN pass."""
    if SLOPE == 0.0:
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(x >= 0, x, x * SLOPE)


@triton.jit
def border_class(position, size):
    """2 at the last pixel of an axis, 0 at the first, 1 between."""
    return tl.where(position == size - 1, 2, tl.where(position == 0, 0, 1))


@triton.jit
def store_statistics(value, inside, stats_ptr, co, CO: tl.constexpr):
    """Count, mean and sum of squared deviations of a tile's pixels for each channel, at stats_ptr [3, CO].

    Around the tile's own mean, so that nothing cancels; tiles are combined later in a fixed order.
    """
    count = tl.sum(inside.to(value.dtype), axis=0)
    mean = tl.sum(tl.where(inside[:, None], value, 0.0), axis=0) / tl.maximum(count, 1.0)
    deviation = tl.where(inside[:, None], value - mean[None, :], 0.0)
    tl.store(stats_ptr + co, tl.zeros_like(mean) + count, mask=co < CO)
    tl.store(stats_ptr + CO + co, mean, mask=co < CO)
    tl.store(stats_ptr + 2 * CO + co, tl.sum(deviation * deviation, axis=0), mask=co < CO)


def unit_grid(out: Tensor, axes: int, phased: bool) -> tuple[int, int, int]:
    """The sizes of `out`, half of them along each axis where an output pixel is 2 unit + phase."""
    depth, height, width = out.shape[1:4]
    if axes == 2 and depth != 1:
        raise ValueError(f"a map of two axes has depth 1, not {depth}")
    if not phased:
        return depth, height, width
    if height % 2 or width % 2 or (axes == 3 and depth % 2):
        raise ValueError(f"phases need even sizes, not {tuple(out.shape[1:4])}")
    return depth // 2 if axes == 3 else 1, height // 2, width // 2


def check_map(name: str, x: Tensor, like: Tensor, sizes: tuple[int, ...] | None = None) -> None:
    """A channels-last map of `like`'s batch, precision and device, and of the given sizes."""
    if x.ndim != 5:
        raise ValueError(f"{name} is [N, D, H, W, C], not {tuple(x.shape)}")
    if x.dtype not in MAP_DTYPES or x.dtype != like.dtype or x.device != like.device:
        raise ValueError(f"{name} is {x.dtype} on {x.device}; maps here are {like.dtype} on {like.device}")
    if x.shape[0] != like.shape[0] or (sizes is not None and tuple(x.shape[1:4]) != tuple(sizes)):
        sizes = like.shape[1:4] if sizes is None else sizes
        raise ValueError(f"{name} is {tuple(x.shape[:4])} where {(like.shape[0], *sizes)} is needed")
    if x.shape[4] == 0:
        raise ValueError(f"{name} has no channels")
    if x.stride(4) != 1 and x.shape[4] > 1:
        raise ValueError(f"{name} is not channels-last: strides {x.stride()}")
    step, count = pixel_stride(x), 1
    for axis in (3, 2, 1):
        if x.shape[axis] > 1 and x.stride(axis) != step * count and x.numel():
            raise ValueError(f"{name} has no constant step between pixels: shape {tuple(x.shape)}, strides {x.stride()}")
        count *= x.shape[axis]


def check_vector(name: str, x: Tensor, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype | None = None) -> None:
    """Weights, in `dtype`; or values beside a sum, in float32 (or in float64 where sums are)."""
    if tuple(x.shape) != shape or not x.is_contiguous() or x.device != like.device:
        raise ValueError(f"{name} is contiguous {shape} on {like.device}, not {tuple(x.shape)}, {x.stride()} on {x.device}")
    if x.dtype not in ((dtype,) if dtype else (torch.float32, sum_dtype(like.dtype))):
        raise ValueError(f"{name} is {x.dtype}; {dtype or sum_dtype(like.dtype)} is needed")


def check_affine(name: str, affine: Affine | None, x: Tensor) -> None:
    for part in affine or ():
        if part.ndim != 2 or part.shape[0] not in (1, x.shape[0]) or part.shape[1] != x.shape[-1]:
            raise ValueError(f"{name} is [1 or {x.shape[0]}, {x.shape[-1]}], not {tuple(part.shape)}")
        if part.stride(1) != 1 and part.shape[1] > 1:
            raise ValueError(f"{name} has its channels {part.stride(1)} apart; they must stand side by side")
        if part.dtype != sum_dtype(x.dtype) or part.device != x.device:
            raise ValueError(f"{name} is {part.dtype} on {part.device}; {sum_dtype(x.dtype)} on {x.device} is needed")
    if affine is not None and (affine[0].shape, affine[0].stride()) != (affine[1].shape, affine[1].stride()):
        raise ValueError(
            f"{name}: scale {tuple(affine[0].shape)} and shift {tuple(affine[1].shape)} differ in shape or strides"
        )


def affine_arguments(affine: Affine | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Scale, shift and the step from image to image: zero where all share them."""
    if affine is None:
        return None, None, 0
    return *affine, affine[0].stride(0) if affine[0].shape[0] > 1 else 0


def pixel_stride(x: Tensor) -> int:
    """The step from pixel to pixel of a map, in elements."""
    return next((x.stride(axis) for axis in (3, 2, 1) if x.shape[axis] > 1), x.shape[4])


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def dot_precision(dtype: torch.dtype) -> str:
    """tf32 where PyTorch's own convolutions would use it. The newer of its two switches: reading the older one raises
    where both were set."""
    return "tf32" if dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def device_of(x: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def interpreted(x: Tensor) -> bool:
    """On the CPU kernels run in Triton's interpreter, where a step takes as long for a large tile as for a small one."""
    return not x.is_cuda
