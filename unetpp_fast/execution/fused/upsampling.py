"""Low sources that are up-sampled before a convolution reads them: one map of one node at a time, by PyTorch's operators.

So linear interpolation is computed for ops that cannot do it as they read, and, whatever the up-sampling, what phases cannot
express: pixel shuffling, and sizes that are not twice those of the level below, at which the last pixel is repeated.
Autograd is off inside an operator: gradients are spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import naive
from ..plan.steps import Plan, Step
from .buffers import Maps, from_maps, to_maps

Parameters = Mapping[str, Tensor]


def projected(
    plan: Plan, step: Step, parameters: Parameters, low: Tensor, affine: naive.Affine | None
) -> tuple[Tensor, naive.Affine | None]:
    """The map that a node up-samples linearly, and how to read it: its low source, through a 1x1 convolution if the plan
    projects."""
    if not plan.project:
        return low, affine
    prefix = f"nodes.{step.node.name}.up.project"
    weight, bias = (parameters[f"{prefix}.{name}"].to(low.dtype) for name in ("weight", "bias"))
    x = naive.read(low, affine, plan.slope).contiguous()  # else its bits would depend on what lies beside it
    return F.linear(x, weight.flatten(1), bias), None


@dataclass(frozen=True)
class Upsampling:
    """The up-sampling of a node's low source into a map of its own.

    size: of that map, `*S`; on each axis that of the low source twice, or one more.
    """

    plan: Plan
    step: Step
    parameters: Parameters
    size: Sequence[int]

    def forward(self, low: Tensor, affine: naive.Affine | None) -> Tensor:
        """The up-sampled map `[N, D, H, W, K]` of the low source `[N, D, H, W, C]`, dense."""
        plan = self.plan
        if plan.upsample in ("deconv", "pixelshuffle"):
            x = from_maps(naive.read(low, affine, plan.slope).contiguous(), plan.axes)
            weight, bias = self._layer(low.dtype)
            if plan.upsample == "deconv":
                x = (F.conv_transpose2d if plan.axes == 2 else F.conv_transpose3d)(x, weight, bias, stride=self._factors)
            else:
                x = (F.conv2d if plan.axes == 2 else F.conv3d)(x, weight, bias, padding=1)
                x = _mean_of_two(_shuffled(x), last=False)
        else:
            x = from_maps(naive.read(*projected(plan, self.step, self.parameters, low, affine), plan.slope), plan.axes)
            mode = "nearest" if plan.upsample == "nearest" else {2: "bilinear", 3: "trilinear"}[plan.axes]
            x = F.interpolate(x, scale_factor=tuple(map(float, self._factors)), mode=mode, align_corners=plan.align_corners)
        return to_maps(repeated(x, self.size), plan.axes).contiguous()

    def backward(self, g: Tensor, low: Tensor, affine: naive.Affine | None) -> tuple[Tensor, dict[str, Tensor]]:
        """From the gradient `[N, K, *S]` of the map to that of what is read of the low source, `[N, D, H, W, C]`, and those
        of the up-sampling's parameters, by name."""
        plan, small = self.plan, from_maps(low, self.plan.axes).shape[2:]
        factors = self._factors
        g = repeated_backward(g, [by * side for by, side in zip(factors, small, strict=True)])
        if plan.upsample in ("deconv", "pixelshuffle"):
            return self._layer_backward(g, low, affine)
        shape = [*g.shape[:2], *small]
        if plan.upsample == "nearest":
            g = _windows_summed(g, factors)
        else:
            back = torch.ops.aten.upsample_bilinear2d_backward if plan.axes == 2 else (
                torch.ops.aten.upsample_trilinear3d_backward
            )  # fmt: skip
            g = back(g.contiguous(), list(g.shape[2:]), shape, plan.align_corners, *map(float, factors))
        if not plan.project:
            return to_maps(g, plan.axes), {}
        name = f"nodes.{self.step.node.name}.up.project"
        weight = self.parameters[f"{name}.weight"]
        gx = torch.empty_like(low, memory_format=torch.contiguous_format)
        g = g.unsqueeze(2) if plan.axes == 2 else g
        gw, gb = naive.head_backward(  # the kernel takes no more channels than a head has classes
            gx, g.contiguous(), low, weight.flatten(1).to(low.dtype), affine=affine, slope=plan.slope
        )
        return gx, {f"{name}.weight": gw.view_as(weight), f"{name}.bias": gb}

    @property
    def _factors(self) -> tuple[int, ...]:
        """By how much each axis grows."""
        return self.plan.topology.stride(self.step.node.level + 1)

    @property
    def _name(self) -> str:
        return f"nodes.{self.step.node.name}.up" + (".conv" if self.plan.upsample == "pixelshuffle" else "")

    def _layer(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the convolution that up-samples."""
        bias = self.parameters.get(f"{self._name}.bias")
        return self.parameters[f"{self._name}.weight"].to(dtype), None if bias is None else bias.to(dtype)

    def _layer_backward(self, g: Tensor, low: Tensor, affine: naive.Affine | None) -> tuple[Tensor, dict[str, Tensor]]:
        plan, (weight, bias) = self.plan, self._layer(low.dtype)
        transposed = plan.upsample == "deconv"
        if not transposed:
            g = _unshuffled(_mean_of_two(g, last=True))
        stride, padding = (list(self._factors), 0) if transposed else ([1] * plan.axes, 1)
        x = from_maps(naive.read(low, affine, plan.slope).contiguous(), plan.axes)
        gx, gw, gb = torch.ops.aten.convolution_backward(
            g, x, weight, None if bias is None else list(bias.shape), stride, [padding] * plan.axes,
            [1] * plan.axes, transposed, [0] * plan.axes, 1, [True, True, bias is not None],
        )  # fmt: skip
        found = {f"{self._name}.weight": gw, **({} if bias is None else {f"{self._name}.bias": gb})}
        acc = naive.accumulator(low.dtype)
        return to_maps(gx, plan.axes), {name: value.to(acc) for name, value in found.items()}


def upsampling(plan: Plan, step: Step, parameters: Parameters, maps: Maps) -> Upsampling:
    """That of a node in a pass with these buffers."""
    return Upsampling(plan, step, parameters, maps.levels[step.node.level].shape[4 - plan.axes : 4])


def repeated(x: Tensor, size: Sequence[int]) -> Tensor:
    """`[N, C, *S]` with the last pixel of an axis repeated where `size` has one more."""
    missing = [have - got for have, got in zip(size, x.shape[2:], strict=True)]
    if not any(missing):
        return x
    return F.pad(x, [amount for axis in reversed(missing) for amount in (0, axis)], mode="replicate")


def repeated_backward(g: Tensor, size: Sequence[int]) -> Tensor:
    """From the gradient of `repeated` to that of its argument, whose size is `size`."""
    for axis, side in enumerate(size, start=2):
        if g.shape[axis] > side:
            whole, more = g.split([side, 1], dim=axis)
            last = whole.narrow(axis, side - 1, 1) + more
            g = torch.cat((whole.narrow(axis, 0, side - 1), last), dim=axis)
    return g


def even(x: Tensor, axes: int) -> Tensor:
    """A map `[N, D, H, W, C]` without the last pixel of its odd axes, which a pool drops: a copy, or `x` if it has none."""
    kept = tuple(slice(0, side // 2 * 2 if axis or axes == 3 else side) for axis, side in enumerate(x.shape[1:4]))
    cut = x[(slice(None), *kept)]
    return x if cut.shape == x.shape else cut.contiguous()


def _shuffled(x: Tensor) -> Tensor:
    """`[N, C 2^axes, *S]` as `[N, C, *2S]`: groups of channels become the pixels of a window."""
    axes = x.ndim - 2
    factors = x.unflatten(1, (-1, *[2] * axes))  # [N, C, 2.., *S]
    interleaved = [axis for i in range(axes) for axis in (2 + axes + i, 2 + i)]
    return factors.permute(0, 1, *interleaved).reshape(*factors.shape[:2], *(2 * side for side in x.shape[2:]))


def _unshuffled(x: Tensor) -> Tensor:
    """The inverse of `_shuffled`."""
    axes = x.ndim - 2
    windows = x.reshape(*x.shape[:2], *(part for side in x.shape[2:] for part in (side // 2, 2)))
    inside, outside = [3 + 2 * i for i in range(axes)], [2 + 2 * i for i in range(axes)]
    return windows.permute(0, 1, *inside, *outside).flatten(1, 1 + axes)


def _mean_of_two(x: Tensor, last: bool) -> Tensor:
    """The mean of each pixel and the one before it on every axis, or with `last` the one after it; zero outside."""
    axes = x.ndim - 2
    pool = F.avg_pool2d if axes == 2 else F.avg_pool3d
    return pool(F.pad(x, ((0, 1) if last else (1, 0)) * axes), 2, stride=1)


def _windows_summed(g: Tensor, factors: Sequence[int]) -> Tensor:
    """`[N, C, *S]`, each axis as many times as large as its factor, as the sum of each window."""
    axes = g.ndim - 2
    parts = (part for side, by in zip(g.shape[2:], factors, strict=True) for part in (side // by, by))
    windows = g.reshape(*g.shape[:2], *parts)
    return windows.sum(dim=[3 + 2 * i for i in range(axes)])
