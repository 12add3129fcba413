"""Convolutions and pools that leave the first axis of a volume alone: those of 2D over its slices, by the same ops.

And what no op computes: convolutions of 3 taps along an axis that their stride does not halve, by PyTorch's operators.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from ...kernels import naive
from ..plan.steps import FLAT_STRIDE, Plan, Step
from .buffers import from_maps, to_maps


def _slices(x: Tensor) -> Tensor:
    """`[N, D, H, W, C]` as `[N D, 1, H, W, C]`, a view."""
    return x.view(-1, 1, *x.shape[2:]) if x.numel() else x.reshape(x.shape[0] * x.shape[1], 1, *x.shape[2:])


def _per_slice(affine: naive.Affine | None, depth: int) -> naive.Affine | None:
    if affine is None or affine[0].shape[0] == 1:
        return affine
    return affine[0].repeat_interleave(depth, 0), affine[1].repeat_interleave(depth, 0)


@dataclass(frozen=True)
class Sliced:
    """Ops over the slices of volumes, by the 2D ones of `ops`; `axes` is not used."""

    ops: ModuleType

    def conv(
        self,
        out: Tensor,
        a: Tensor,
        wa: Tensor,
        *,
        axes: int,
        affine_a=None,
        b: Tensor | None = None,
        affine_b=None,
        **options,
    ) -> Tensor | None:
        images, depth = out.shape[:2]
        affine_a, affine_b = _per_slice(affine_a, depth), _per_slice(affine_b, depth)
        b = None if b is None else _slices(b)
        stats = self.ops.conv(
            _slices(out), _slices(a), wa, axes=2, affine_a=affine_a, b=b, affine_b=affine_b, **options
        )  # fmt: skip
        return None if stats is None else stats.reshape(images, depth * stats.shape[1], *stats.shape[2:])

    def conv_wgrad(self, a: Tensor, dy: Tensor, *, axes: int, affine=None, **options) -> Tensor:
        return self.ops.conv_wgrad(_slices(a), _slices(dy), axes=2, affine=_per_slice(affine, a.shape[1]), **options)

    def pool(self, out: Tensor, x: Tensor, *, axes: int, affine=None, slope: float = 0.0) -> None:
        self.ops.pool(_slices(out), _slices(x), axes=2, affine=_per_slice(affine, x.shape[1]), slope=slope)

    def pool_backward(self, gx: Tensor, g: Tensor, x: Tensor, *, axes: int, affine=None, slope=0.0, add=False) -> None:
        affine = _per_slice(affine, x.shape[1])
        self.ops.pool_backward(_slices(gx), _slices(g), _slices(x), axes=2, affine=affine, slope=slope, add=add)


@dataclass(frozen=True)
class Strided:
    """The first convolution of a level, `[CO, K, *kernel]`, that shrinks each axis by its stride."""

    weight: Tensor
    stride: tuple[int, ...]

    def forward(self, out: Tensor, x: Tensor, bias: Tensor | None, slope: float, act: bool, stats: bool) -> Tensor | None:
        """Into `out`; the epilogue as that of `naive.conv`."""
        bias = None if bias is None else bias.to(x.dtype)
        y = F.conv3d(from_maps(x, 3), self.weight.to(x.dtype), bias, self.stride, self._padding)
        y = to_maps(y, 3)
        out.copy_(naive.activate(y, slope) if act else y)
        if not stats:
            return None
        values = out.to(naive.accumulator(out.dtype)).flatten(1, 3)
        mean = values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        return torch.stack((torch.full_like(mean, values.shape[1]), mean, squares), 1)[:, None]

    def backward(self, g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """From the gradient of what is stored to that of x, `[N, D, H, W, K]`, and that of the weight."""
        geometry = list(self.stride), self._padding, [1] * 3, False, [0] * 3, 1
        gx, gw, _ = torch.ops.aten.convolution_backward(
            from_maps(g, 3), from_maps(x, 3), self.weight.to(x.dtype), None, *geometry, [True, True, False]
        )
        return to_maps(gx, 3), gw

    @property
    def _padding(self) -> list[int]:
        return [taps // 2 for taps in self.weight.shape[2:]]


def of_step(ops: ModuleType, step: Step) -> ModuleType | Sliced:
    """What computes the convolutions of a node."""
    return Sliced(ops) if step.flat else ops


def of_pool(ops: ModuleType, plan: Plan, step: Step) -> tuple[ModuleType | Sliced, int]:
    """What pools the level above a node, and the number of axes that it halves."""
    return (Sliced(ops), 2) if plan.topology.stride(step.node.level) == FLAT_STRIDE else (ops, plan.axes)
