"""Convolution weights as the kernels' operands: taps first, up-sampling and norm folded in, flipped for data gradients.

Everything here is a small multilinear expression of the parameters, differentiable by autograd; for use inside an
operator, where autograd is off, `first_operands_backward` is its gradient. Composition is done in the parameters' own
precision and rounded last.

An example on one axis: conv3(up2(x)) as two 2-tap convolutions of x. up2 puts x[i] u[q] at position 2i + q, for elements
q = 0 and 1: a transposed convolution's two weights, or u = (1, 1) for nearest neighbour. conv3 weighs positions o - 1, o
and o + 1 by w0, w1 and w2. Even outputs (phase 0) and odd ones (phase 1) then read two pixels of x each::

    out[2i]     = x[i-1] w0 u1              +  x[i]   (w1 u0 + w2 u1)         nearest: w0       and  w1 + w2
    out[2i + 1] = x[i]   (w0 u0 + w1 u1)    +  x[i+1] w2 u0                            w0 + w1  and  w2

`phase_weights` computes these four sums, the places, by adding the products of w with each element of u at its own place::

    places[1:4] += w u0     0     w0u0         w1u0         w2u0
    places[0:3] += w u1     w0u1  w1u1         w2u1         0
                    sums    w0u1  w0u0 + w1u1  w1u0 + w2u1  w2u0

Place 2t + p is the weight of phase p for tap t, which reads x[i + t + p - 1]: `_by_phase` takes places 0 and 2 as phase 0,
places 1 and 3 as phase 1. In 2D and 3D the same is done axis by axis.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Operands:
    """The first convolution of a node: weights of the prefix `[3^axes, KA, CO]` and of the low source
    (`[2^axes, 2^axes, KB, CO]` by phases, `[1, 3^axes, KB, CO]` at full resolution), bias `[CO]`, border `[3^axes, CO]`."""

    wa: Tensor
    wb: Tensor | None = None
    bias: Tensor | None = None
    border: Tensor | None = None

    def tensors(self) -> list[Tensor | None]:
        return [self.wa, self.wb, self.bias, self.border]


def taps_first(weight: Tensor) -> Tensor:
    """`[CO, K, 3, 3(, 3)]` as `[taps, K, CO]`."""
    return weight.flatten(2).permute(2, 1, 0)


def taps_last(wa: Tensor, taps: int | Sequence[int]) -> Tensor:
    """The inverse of `taps_first`; taps: per axis, or the number of axes that have 3."""
    return wa.permute(2, 1, 0).unflatten(2, (3,) * taps if isinstance(taps, int) else tuple(taps))


def flipped(wa: Tensor) -> Tensor:
    """The weights `[taps, CO, K]` with which a unit-stride convolution of dy gives the data gradient."""
    return wa.flip(0).transpose(1, 2)


def _by_place(wb: Tensor, axes: int) -> Tensor:
    """Phase weights `[2^axes, 2^axes, K, CO]` as `[4.., K, CO]`, by place 2 tap + phase on each axis."""
    channels = wb.shape[-2:]
    phases_then_taps = wb.reshape(*[2] * (2 * axes), *channels)
    order = [axis + offset for axis in range(axes) for offset in (axes, 0)]  # tap and phase of each axis
    return phases_then_taps.permute(*order, -2, -1).reshape(*[4] * axes, *channels)


def _by_phase(places: Tensor, axes: int) -> Tensor:
    """The inverse of `_by_place`."""
    channels = places.shape[-2:]
    tap_and_phase = places.reshape(*[2] * (2 * axes), *channels)
    order = [2 * axis + offset for offset in (1, 0) for axis in range(axes)]  # the phases of all axes, then the taps
    return tap_and_phase.permute(*order, -2, -1).reshape(2**axes, 2**axes, *channels)


def gathered(wb: Tensor, axes: int) -> Tensor:
    """Phase weights `[2^axes, 2^axes, K, CO]` as those of the low source's data gradient, `[4^axes, CO, K]`.

    Low pixel u meets dy at 2u - 1 + q, q = 0..3 on each axis, through (phase, tap) with q = 3 - 2 tap - phase.
    """
    return _by_place(wb, axes).flip(*range(axes)).flatten(0, axes - 1).transpose(1, 2)


def strided_gradient(weight: Tensor, axes: int) -> Tensor:
    """Of a convolution of stride 2, with which the gradient of its output, as a low source, gives that of its input:
    phase weights `[2^axes, 2^axes, CO, K]`, from `[3^axes, CO, K]` (`flipped`).

    Input pixel i meets output u with tap i - 2u + 1, which is 3 less the place of that input's phase and u.
    """
    places = F.pad(weight.unflatten(0, (3,) * axes), [0, 0, 0, 0] + [1, 0] * axes)
    return _by_phase(places, axes)


def strided_weight_gradient(g: Tensor, axes: int) -> Tensor:
    """The gradient `[3^axes, K, CO]` of a convolution's weights of stride 2, from that `[2^axes, 2^axes, CO, K]` of phase
    weights between the gradient of its output, as a low source, and its input; see `strided_gradient`."""
    places = _by_place(g, axes)[(slice(1, None),) * axes]
    return flipped(places.flatten(0, axes - 1))


def _is_nearest(up: Tensor | None) -> bool:
    """Whether the up-sampling repeats pixels, after a 1x1 convolution or none; else it is a transposed convolution."""
    return up is None or up.shape[-1] == 1


def phase_weights(weight: Tensor, up: Tensor | None) -> Tensor:
    """`[2^axes, 2^axes, K, CO]` from the part `[CO, C, 3..]` of a convolution's weight that reads the up-sampled map.

    up: None (nearest neighbour), a transposed convolution's weight `[K, C, 2..]`, or a 1x1 convolution's before a
    nearest-neighbour up-sampling, as `[K, C, 1..]`.
    """
    axes = weight.ndim - 2
    if _is_nearest(up):
        projected = weight if up is None else torch.einsum("oc...,kc->ok...", weight, up.flatten(1))  # [CO, K, 3..]
        places = projected.permute(*range(2, 2 + axes), 1, 0).contiguous()
        for axis in range(axes):  # both elements are the same: neighbours in 0, w0, w1, w2, 0 are added
            padded = F.pad(places, [0] * 2 * (axes + 1 - axis) + [1, 1])
            places = padded.narrow(axis, 0, 4) + padded.narrow(axis, 1, 4)
        return _by_phase(places, axes)
    by_tap = _by_tap(weight)
    first, *others = itertools.product((0, 1), repeat=axes)
    places = F.pad(torch.matmul(_at(up, first), by_tap), [0, 0, 0, 0] + [1, 0] * axes)  # [4.., K, CO]
    for element in others:
        places[_window(element)] += torch.matmul(_at(up, element), by_tap)
    return _by_phase(places, axes)


def _by_tap(weight: Tensor) -> Tensor:
    """`[CO, C, 3..]` as `[3.., C, CO]`, contiguous."""
    return weight.movedim((1, 0), (-2, -1)).contiguous()


def _at(up: Tensor, element: tuple[int, ...]) -> Tensor:
    """A view of the weights of one element of an up-sampling."""
    where: Any = (..., *element)
    return up[where]


def _window(element: tuple[int, ...]) -> tuple[slice, ...]:
    """The places to which the products of an element of an up-sampling with the three taps of each axis are added."""
    return tuple(slice(1 - q, 4 - q) for q in element)


def phase_weights_backward(g: Tensor, weight: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """From the gradient of `phase_weights(weight, up)` to those of weight and up."""
    axes = weight.ndim - 2
    places = _by_place(g, axes)
    if _is_nearest(up):
        for axis in range(axes):
            places = places.narrow(axis, 0, 3) + places.narrow(axis, 1, 3)
        g_projected = places.permute(-1, -2, *range(axes))  # [CO, K, 3..]
        if up is None:
            return g_projected, None
        g_weight = torch.einsum("ok...,kc->oc...", g_projected, up.flatten(1))
        g_places = places.flatten(0, axes - 1)  # [3^axes, K, CO]
        return g_weight, torch.matmul(g_places, _by_tap(weight).flatten(0, axes - 1).mT).sum(0).view_as(up)
    by_tap, g_up = _by_tap(weight), torch.empty_like(up)
    g_by_tap: Any = 0
    for element in itertools.product((0, 1), repeat=axes):
        g_products = places[_window(element)]  # [3.., K, CO]
        g_by_tap = g_by_tap + torch.matmul(_at(up, element).T, g_products)
        _at(g_up, element)[...] = torch.matmul(g_products, by_tap.mT).flatten(0, axes - 1).sum(0)
    return g_by_tap.movedim((-2, -1), (1, 0)), g_up


def _over_neighbours(x: Tensor, axes: int) -> Tensor:
    """Of `[3.., CO]`, by tap, the sums over the taps inside the map, by border class: taps 1 and 2 at the first pixel of
    an axis, all of them within, 0 and 1 at the last. The matrix [[0, 1, 1], [1, 1, 1], [1, 1, 0]] that does so is
    symmetric: of values by class, these are the sums by tap."""
    windows = F.pad(x, [0, 0] + [1, 1] * axes)
    for axis in range(axes):
        windows = windows.unfold(axis, 3, 1)
    from_last_to_first = windows.sum(dim=tuple(range(-axes, 0)))
    return from_last_to_first.flip(*range(axes))


def border_table(weight: Tensor, up_bias: Tensor) -> Tensor:
    """`[3^axes, CO]`: what the bias of an up-sampling adds, by border class; taps outside the map carry none."""
    axes = weight.ndim - 2
    by_tap = torch.einsum("oc...,c->...o", weight, up_bias)
    return _over_neighbours(by_tap, axes).flatten(0, axes - 1)


def border_table_backward(g: Tensor, weight: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `border_table(weight, up_bias)` to those of its arguments."""
    axes = weight.ndim - 2
    by_tap = _over_neighbours(g.reshape(*[3] * axes, -1), axes).movedim(-1, 0)  # [CO, 3..]
    g_weight = torch.einsum("o...,c->oc...", by_tap, up_bias)
    # One sum after another: as a single product its bits would depend on the number of threads, with some libraries.
    return g_weight, torch.matmul(weight.flatten(2), by_tap.flatten(1)[..., None]).squeeze(-1).sum(0)


def first_operands(
    weight: Tensor,
    bias: Tensor | None,
    prefix: int,
    form: str | None,
    up: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Operands:
    """The operands of a node's first convolution.

    Args:
        weight: `[CO, prefix + C, 3..]`, the prefix's channels first.
        form: None (no low source), "phases", or "full" for a map that was up-sampled beforehand.
        up, up_bias: of the up-sampling, for "phases"; see `phase_weights`.
    """
    wa, low = taps_first(weight[:, :prefix]), weight[:, prefix:]
    if form is None:
        return Operands(wa, None, bias)
    if form == "full":
        return Operands(wa, taps_first(low)[None], bias)
    border = None if up_bias is None else border_table(low, up_bias)
    return Operands(wa, phase_weights(low, up), bias, border)


def first_operands_backward(
    g: Operands, weight: Tensor, prefix: int, form: str | None, up: Tensor | None = None, up_bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradients of `first_operands` (bias apart) to those of weight, up and up_bias."""
    g_weight, g_up, g_up_bias = torch.empty_like(weight), None, None
    g_weight[:, :prefix] = taps_last(g.wa, weight.shape[2:])
    low, g_low = weight[:, prefix:], g_weight[:, prefix:]
    if form == "full":
        g_low.copy_(taps_last(g.wb[0], weight.shape[2:]))
    elif form == "phases":
        from_phases, g_up = phase_weights_backward(g.wb, low, up)
        g_low.copy_(from_phases)
        if up_bias is not None:
            from_border, g_up_bias = border_table_backward(g.border, low, up_bias)
            g_low += from_border
    return g_weight, g_up, g_up_bias


def fold(weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution followed by a batch norm (gamma, beta, mean, variance) in eval mode."""
    gamma, beta, mean, variance = norm
    scale = gamma * (variance + eps).rsqrt()
    centred = -mean if bias is None else bias - mean
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), centred * scale + beta
