"""Weights as the engine's operands: taps first, up-sampling folded in, norm folded in, flipped for data gradients.

Everything here is a small multilinear expression of the parameters, differentiable by autograd; for use inside an
operator, where autograd is off, `first_operands_backward` is its gradient. Composition is done in the parameters' own
precision and rounded last.

Per axis, output pixel 2u + p of conv3(up2(x)) meets its tap r at the up-sampled position 2u + p + r - 1, which is
element q = (p + r - 1) mod 2 of low pixel u + (p + r - 1) // 2: tap t = (p + r - 1) // 2 - p + 1 of a 2-tap convolution.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def taps_last(wa: Tensor, axes: int) -> Tensor:
    """The inverse of `taps_first`."""
    return wa.permute(2, 1, 0).unflatten(2, (3,) * axes)


def flipped(wa: Tensor) -> Tensor:
    """The weights `[taps, CO, K]` with which a unit-stride convolution of dy gives the data gradient."""
    return wa.flip(0).transpose(1, 2)


def _by_place(wb: Tensor, axes: int) -> Tensor:
    """Phase weights `[2^axes, 2^axes, K, CO]` as `[4.., K, CO]`, by 2 tap + phase on each axis."""
    order = [axis + offset for axis in range(axes) for offset in (axes, 0)]
    wb = wb.reshape(*[2] * (2 * axes), *wb.shape[-2:])
    return wb.permute(*order, -2, -1).reshape(*[4] * axes, *wb.shape[-2:])


def _by_phase(places: Tensor, axes: int) -> Tensor:
    """The inverse of `_by_place`."""
    order = [2 * axis + offset for offset in (1, 0) for axis in range(axes)]
    pairs = places.reshape(*[2] * (2 * axes), *places.shape[-2:])
    return pairs.permute(*order, -2, -1).reshape(2**axes, 2**axes, *places.shape[-2:])


def gathered(wb: Tensor, axes: int) -> Tensor:
    """Phase weights `[2^axes, 2^axes, K, CO]` as those of the low source's data gradient, `[4^axes, CO, K]`.

    Low pixel u meets dy at 2u - 1 + q, q = 0..3 on each axis, through (phase, tap) with q = 3 - 2 tap - phase.
    """
    return _by_place(wb, axes).flip(*range(axes)).flatten(0, axes - 1).transpose(1, 2)


def _project(weight: Tensor, up: Tensor | None) -> Tensor:
    """`[CO, C, 3..]` before a 1x1 convolution `[K, C, 1..]` as `[CO, K, 3..]`."""
    return weight if up is None else torch.einsum("oc...,kc->ok...", weight, up.flatten(1))


def phase_weights(weight: Tensor, up: Tensor | None) -> Tensor:
    """`[2^axes, 2^axes, K, CO]` from the part `[CO, C, 3..]` of a convolution's weight that reads the up-sampled map.

    up: None (nearest neighbour), a transposed convolution's weight `[K, C, 2..]`, or a 1x1 convolution's before a
    nearest-neighbour up-sampling, as `[K, C, 1..]`. Place 2t + p meets tap 2t + p - 1 + q at element q, on each axis.
    """
    axes = weight.ndim - 2
    border = [0, 0, 0, 0] + [1, 1] * axes
    if up is None or up.shape[-1] == 1:
        pairs = F.pad(_project(weight, up).permute(*range(2, 2 + axes), 1, 0), border)
        pairs = pairs.expand(*[2] * axes, *pairs.shape)
    else:
        expression = "ocrs,kcqh->qhrsko" if axes == 2 else "ocrsx,kcqhg->qhgrsxko"
        pairs = F.pad(torch.einsum(expression, weight, up), border)
    for _ in range(axes):
        first, second = pairs.unbind()
        pairs = first.narrow(axes - 1, 0, 4) + second.narrow(axes - 1, 1, 4)
    return _by_phase(pairs, axes)


def phase_weights_backward(g: Tensor, weight: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """From the gradient of `phase_weights(weight, up)` to those of weight and up."""
    axes = weight.ndim - 2
    pairs = _by_place(g, axes)
    for axis in range(axes):
        pairs = pairs.unfold(axis, 3, 1)  # by 1 - q and, behind K and CO, by tap
    if up is None or up.shape[-1] == 1:
        g = pairs.sum(dim=tuple(range(axes))).transpose(0, 1)
        if up is None:
            return g, None
        g_up = torch.einsum("okz,ocz->kc", g.flatten(2), weight.flatten(2))
        return torch.einsum("ok...,kc->oc...", g, up.flatten(1)), g_up.view_as(up)
    pairs = pairs.flip(*range(axes))
    expressions = ("qhkors,kcqh->ocrs", "qhkors,ocrs->kcqh") if axes == 2 else (
        "qhgkorsx,kcqhg->ocrsx", "qhgkorsx,ocrsx->kcqhg")  # fmt: skip
    return torch.einsum(expressions[0], pairs, up), torch.einsum(expressions[1], pairs, weight)


def _over_neighbours(x: Tensor, axes: int) -> Tensor:
    """Of `[3.., CO]`, by border class, the sums over the taps inside the map; of sums by class, those by tap: the matrix
    [[0, 1, 1], [1, 1, 1], [1, 1, 0]] on each axis is symmetric."""
    x = F.pad(x, [0, 0] + [1, 1] * axes)
    for axis in range(axes):
        x = x.unfold(axis, 3, 1)
    return x.sum(dim=tuple(range(-axes, 0))).flip(*range(axes))


def border_table(weight: Tensor, up_bias: Tensor) -> Tensor:
    """`[3^axes, CO]`: what the bias of an up-sampling adds, by border class; taps outside the map carry none."""
    axes = weight.ndim - 2
    return _over_neighbours(torch.einsum("oc...,c->...o", weight, up_bias), axes).flatten(0, axes - 1)


def border_table_backward(g: Tensor, weight: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `border_table(weight, up_bias)` to those of its arguments."""
    axes = weight.ndim - 2
    summed = _over_neighbours(g.reshape(*[3] * axes, -1), axes).movedim(-1, 0)
    return torch.einsum("o...,c->oc...", summed, up_bias), torch.einsum("oz,ocz->c", summed.flatten(1), weight.flatten(2))


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
    wa = taps_first(weight[:, :prefix])
    if form is None:
        return Operands(wa, None, bias)
    if form == "full":
        return Operands(wa, taps_first(weight[:, prefix:])[None], bias)
    low = weight[:, prefix:]
    border = None if up_bias is None else border_table(low, up_bias)
    return Operands(wa, phase_weights(low, up), bias, border)


def first_operands_backward(
    g: Operands, weight: Tensor, prefix: int, form: str | None, up: Tensor | None = None, up_bias: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """From the gradients of `first_operands` (bias apart) to those of weight, up and up_bias."""
    axes = weight.ndim - 2
    g_weight, g_up, g_up_bias = torch.empty_like(weight), None, None
    g_weight[:, :prefix] = taps_last(g.wa, axes)
    low, g_low = weight[:, prefix:], g_weight[:, prefix:]
    if form == "full":
        g_low.copy_(taps_last(g.wb[0], axes))
    elif form == "phases":
        part, g_up = phase_weights_backward(g.wb, low, up)
        g_low.copy_(part)
        if up_bias is not None:
            part, g_up_bias = border_table_backward(g.border, low, up_bias)
            g_low += part
    return g_weight, g_up, g_up_bias


def fold(weight: Tensor, bias: Tensor | None, norm: tuple[Tensor, ...], eps: float) -> tuple[Tensor, Tensor]:
    """Weight and bias of a convolution followed by a batch norm (gamma, beta, mean, variance) in eval mode."""
    gamma, beta, mean, variance = norm
    scale = gamma * (variance + eps).rsqrt()
    start = -mean if bias is None else bias - mean
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), start * scale + beta
