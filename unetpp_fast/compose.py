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
    return wa.flip(0).transpose(1, 2).contiguous()


def gathered(wb: Tensor, axes: int) -> Tensor:
    """Phase weights `[2^axes, 2^axes, K, CO]` as those of the low source's data gradient, `[4^axes, CO, K]`.

    Low pixel u meets dy at 2u - 1 + q, q = 0..3 on each axis, through (phase, tap) with q = 3 - 2 tap - phase.
    """
    pair = torch.tensor([[1, 1], [0, 1], [1, 0], [0, 0]], device=wb.device)
    phase = tap = torch.zeros((1,) * axes, dtype=torch.long, device=wb.device)
    for axis in range(axes):
        shape = [4 if k == axis else 1 for k in range(axes)]
        phase = 2 * phase + pair[:, 0].view(shape)
        tap = 2 * tap + pair[:, 1].view(shape)
    return wb[phase.flatten(), tap.flatten()].transpose(1, 2).contiguous()


def _incidence(like: Tensor) -> Tensor:
    """`[p, t, r, q]`: 1 where phase p meets tap r of the 3-tap kernel at element q of low tap t."""
    table = like.new_zeros(2, 2, 3, 2)
    for p in (0, 1):
        for r in range(3):
            table[p, (p + r - 1) // 2 - p + 1, r, (p + r - 1) % 2] = 1
    return table


def phase_weights(weight: Tensor, up: Tensor | None) -> Tensor:
    """`[2^axes, 2^axes, K, CO]` from the part `[CO, C, 3..]` of a convolution's weight that reads the up-sampled map.

    up: None (nearest neighbour), a transposed convolution's weight `[K, C, 2..]`, or a 1x1 convolution's before a
    nearest-neighbour up-sampling, as `[K, C, 1..]`.
    """
    axes = weight.ndim - 2
    table = _incidence(weight)
    if up is None or up.shape[-1] == 1:
        low = weight if up is None else torch.einsum("oc...,kc->ok...", weight, up.flatten(1).view(up.shape[0], up.shape[1]))
        table = table.sum(dim=3)
        expression = "atr,bus,okrs->abtuko" if axes == 2 else "atr,bus,cvx,okrsx->abctuvko"
        result = torch.einsum(expression, *[table] * axes, low)
    elif axes == 2:
        pairs = torch.einsum("ocrs,kcqh->rsqhko", weight, up)
        result = torch.einsum("atrq,bush,rsqhko->abtuko", table, table, pairs)
    else:
        pairs = torch.einsum("ocrsx,kcqhg->rsxqhgko", weight, up)
        result = torch.einsum("atrq,bush,cvxg,rsxqhgko->abctuvko", table, table, table, pairs)
    return result.reshape(2**axes, 2**axes, *result.shape[-2:])


def phase_weights_backward(g: Tensor, weight: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """From the gradient of `phase_weights(weight, up)` to those of weight and up."""
    axes = weight.ndim - 2
    table = _incidence(weight)
    g = g.reshape(*[2] * (2 * axes), *g.shape[-2:])
    if up is None or up.shape[-1] == 1:
        table = table.sum(dim=3)
        expression = "atr,bus,abtuko->okrs" if axes == 2 else "atr,bus,cvx,abctuvko->okrsx"
        g = torch.einsum(expression, *[table] * axes, g)
        if up is None:
            return g, None
        flat = up.flatten(1).view(up.shape[0], up.shape[1])
        return torch.einsum("ok...,kc->oc...", g, flat), torch.einsum(
            "okz,ocz->kc", g.flatten(2), weight.flatten(2)
        ).view_as(up)
    if axes == 2:
        pairs = torch.einsum("atrq,bush,abtuko->rsqhko", table, table, g)
        return torch.einsum("rsqhko,kcqh->ocrs", pairs, up), torch.einsum("rsqhko,ocrs->kcqh", pairs, weight)
    pairs = torch.einsum("atrq,bush,cvxg,abctuvko->rsxqhgko", table, table, table, g)
    return torch.einsum("rsxqhgko,kcqhg->ocrsx", pairs, up), torch.einsum("rsxqhgko,ocrsx->kcqhg", pairs, weight)


def _inside(like: Tensor) -> Tensor:
    """`[class, r]`: whether tap r lies inside the map at a first, inner or last pixel."""
    return like.new_tensor([[0, 1, 1], [1, 1, 1], [1, 1, 0]])


def border_table(weight: Tensor, up_bias: Tensor) -> Tensor:
    """`[3^axes, CO]`: what the bias of an up-sampling adds, by border class; taps outside the map carry none."""
    axes = weight.ndim - 2
    summed = torch.einsum("oc...,c->o...", weight, up_bias)
    expression = "ar,bs,ors->abo" if axes == 2 else "ar,bs,cx,orsx->abco"
    return torch.einsum(expression, *[_inside(weight)] * axes, summed).flatten(0, axes - 1)


def border_table_backward(g: Tensor, weight: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient of `border_table(weight, up_bias)` to those of its arguments."""
    axes = weight.ndim - 2
    g = g.reshape(*[3] * axes, -1)
    expression = "ar,bs,abo->ors" if axes == 2 else "ar,bs,cx,abco->orsx"
    summed = torch.einsum(expression, *[_inside(weight)] * axes, g)
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
