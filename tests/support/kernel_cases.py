"""Inputs of the kernels' tests, sliced out of larger buffers full of NaN, and the rule by which results are judged."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from support.helpers import FLOAT32, max_error
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAPS = [(2, (1, 6, 10)), (2, (1, 2, 8)), (3, (4, 2, 6))]  # axes, size with even axes
# Triton's interpreter, which runs the kernels where there is no GPU, computes bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


class Map:
    """`view` is a channels-last map that holds `values`; all around it in `buffer` is NaN, which must stay."""

    def __init__(self, values: Tensor, dtype: torch.dtype, left: int = 3, right: int = 2) -> None:
        images, depth, height, width, channels = values.shape
        step = left + channels + right
        self.buffer = torch.full((images, depth * height * width + 1, step), math.nan, dtype=dtype, device=DEVICE)
        strides = (self.buffer.stride(0), height * width * step, width * step, step, 1)
        self.view = self.buffer.as_strided(values.shape, strides, left)
        self.view.copy_(values)
        self.before = self.buffer.clone()

    def assert_untouched(self, written: bool = False) -> None:
        """Nothing but the view has changed; nor has the view, unless it was to be `written`."""
        if written:
            self.before.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).copy_(self.view)
        integers = INTEGERS[self.buffer.dtype]
        assert torch.equal(self.buffer.view(integers), self.before.view(integers))


def random_map(images: int, size: Sequence[int], channels: int, dtype: torch.dtype, seed: int = 0) -> Map:
    return Map(random(images, *size, channels, seed=seed), dtype)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def random_affine(rows: int | None, channels: int, seed: int = 0) -> tuple[Tensor, Tensor] | None:
    """Scales of both signs, and shifts; None without `rows`, for maps that hold what their readers see."""
    return None if rows is None else (random(rows, channels, seed=seed), 0.3 * random(rows, channels, seed=seed + 1))


def doubled(value):
    """A copy of a tensor or a tuple of them in double precision; anything else unchanged."""
    if isinstance(value, tuple):
        return tuple(doubled(v) for v in value)
    return value.double().clone() if isinstance(value, Tensor) else value


def assert_kernel_close(actual: Tensor, exact: Tensor, naive: Tensor) -> None:
    """Error at most twice that of `naive` in its precision plus a rounding; in single precision or 1e-5 of the largest."""
    assert actual.shape == exact.shape and actual.dtype == naive.dtype, f"{actual.shape} {actual.dtype}, {exact.shape}"
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all(), "not finite"
    largest = exact.abs().max().item()
    bound = 2 * max_error(naive, exact)
    if actual.dtype == torch.float32:
        bound = max(bound, FLOAT32 * largest)  # single-precision results of half maps may carry the rounding of what is read
    else:
        bound += torch.finfo(actual.dtype).eps / 2 * largest
    assert max_error(actual, exact) <= bound, f"error {max_error(actual, exact):.3e}, allowed {bound:.3e} of {largest:.3e}"
