"""The convolutions of `naive.py` by PyTorch, which on a GPU calls cuDNN: candidates beside the fused kernels.

A library needs dense, activated operands. So a prefix is copied out of its level buffer, like the concatenation of an
ordinary implementation; a low source stays at its own resolution, because its convolution by phases is a transposed
convolution with 4 taps and stride 2:

    out[2u + p] = sum_t b[u + t + p - 1] Wb[p, t]  =  sum_i b[i] V[2u + p + 1 - 2i],    V[3 - 2t - p] = Wb[p, t]
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import naive
from .naive import Affine
from .read import finish, read


def _first(x: Tensor, axes: int) -> Tensor:
    """`[N, D, H, W, C]` as a channels-first view, `[N, C, *S]`."""
    x = x.movedim(-1, 1)
    return x.squeeze(2) if axes == 2 else x


def _last(x: Tensor, axes: int) -> Tensor:
    """The inverse of `_first`, dense."""
    x = x.unsqueeze(2) if axes == 2 else x
    return x.movedim(1, -1).contiguous()


def _kernel(taps: Tensor, axes: int) -> Tensor:
    """`[taps^axes, K, CO]` as a convolution's weight `[CO, K, *taps]`."""
    size = round(taps.shape[0] ** (1 / axes))
    return taps.permute(2, 1, 0).unflatten(2, (size,) * axes)


def transposed(wb: Tensor, axes: int) -> Tensor:
    """Phase weights `[2^axes, 2^axes, K, CO]` as those of the transposed convolution, `[K, CO, 4..]`."""
    order = [axis + offset for axis in range(axes) for offset in (axes, 0)]  # by 2 tap + phase on each axis
    places = wb.reshape(*[2] * (2 * axes), *wb.shape[-2:]).permute(*order, -2, -1)
    return places.reshape(*[4] * axes, *wb.shape[-2:]).flip(*range(axes)).movedim((-2, -1), (0, 1))


def by_phase(weight: Tensor, axes: int) -> Tensor:
    """The inverse of `transposed`."""
    places = weight.movedim((0, 1), (-2, -1)).flip(*range(axes)).reshape(*[2] * (2 * axes), *weight.shape[:2])
    order = [2 * axis + offset for offset in (1, 0) for axis in range(axes)]
    return places.permute(*order, -2, -1).reshape(2**axes, 2**axes, *weight.shape[:2])


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
) -> Tensor | None:
    """`naive.conv`, each operand's part rounded to the maps' precision before they are added."""
    convolve, transpose = (F.conv2d, F.conv_transpose2d) if axes == 2 else (F.conv3d, F.conv_transpose3d)
    second = None
    if b is not None:
        x = _first(read(b, affine_b, slope), axes)
        if phased:
            second = transpose(x, transposed(wb, axes), stride=2, padding=1)
        else:
            second = convolve(x, _kernel(wb[0], axes), padding=1)
        second = _last(second, axes)
    first, second = second, None
    if a.shape[-1]:
        x = _first(read(a, affine_a, slope, plain), axes)
        step = 1 if phased else stride
        second, first = first, _last(convolve(x, _kernel(wa, axes), stride=step, padding=1), axes)
    return finish(out, first, second, axes=axes, bias=bias, border=border, act=act, slope=slope, add=add, stats=stats)


def conv_wgrad(
    a: Tensor,
    dy: Tensor,
    *,
    axes: int,
    phased: bool = False,
    affine: Affine | None = None,
    slope: float = 0.0,
    plain: int = 0,
) -> Tensor:
    """`naive.conv_wgrad`, rounded to the maps' precision once."""
    x, g = _first(read(a, affine, slope, plain), axes), _first(dy, axes)
    shape = (a.shape[-1], dy.shape[-1], *[4] * axes) if phased else (dy.shape[-1], a.shape[-1], *[3] * axes)
    stride = 2 if phased else 1
    like = x.new_empty(1).expand(shape)  # only the shape of the weight is used
    gradient = torch.ops.aten.convolution_backward(
        g, x, like, None, [stride] * axes, [1] * axes, [1] * axes, phased, [0] * axes, 1, [False, True, False]
    )[1].to(naive.accumulator(a.dtype))
    return by_phase(gradient, axes) if phased else gradient.flatten(2).permute(2, 1, 0)[None]
