"""scSE gates (`architecture/gates.py`) in a pass, by PyTorch's operators: what a gate scales is a map of its own.

The input of a gated node's first convolution is one map, prefix and up-sampled low source, made when it is needed and kept
by no pass. Autograd is off inside an operator: gradients are spelled out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import naive
from ..plan.steps import Plan, Step
from .buffers import Maps
from .upsampling import upsampling

Parameters = Mapping[str, Tensor]


def joined(plan: Plan, step: Step, parameters: Parameters, maps: Maps) -> Tensor:
    """The input of a gated node before its gate, `[N, D, H, W, C]`, dense: the prefix, then the up-sampled low source."""
    low = upsampling(plan, step, parameters, maps).forward(*maps.low(step))
    return torch.cat((maps.prefix(step)[0], low), dim=-1) if step.prefix else low


@dataclass(frozen=True)
class Gate:
    """One gate, by its name: x (c + s) for a map x `[N, D, H, W, C]`, with c per image and channel, s per pixel."""

    name: str
    parameters: Parameters

    def forward(self, x: Tensor) -> Tensor:
        """The scaled map, dense."""
        acc = x.to(naive.accumulator(x.dtype)).contiguous()  # else its bits would depend on what lies beside it
        by_channel, by_pixel, *_ = self._scales(acc)
        return (acc * (naive.per_image(by_channel) + by_pixel)).to(x.dtype)

    def backward(self, g: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """From the gradient of the scaled map to that of `x`, both `[N, D, H, W, C]`, and those of the gate's parameters, by
        name."""
        dtype, acc = x.dtype, naive.accumulator(x.dtype)
        x, g = x.to(acc).contiguous(), g.to(acc)
        by_channel, by_pixel, means, hidden = self._scales(x)
        products = g * x
        of_pixels = products.sum(-1, keepdim=True) * by_pixel * (1 - by_pixel)
        of_excite = products.sum((1, 2, 3)) * by_channel * (1 - by_channel)
        of_squeeze = (of_excite @ self._weight("excite", acc)) * (hidden > 0)
        of_means = of_squeeze @ self._weight("squeeze", acc)
        gx = g * (naive.per_image(by_channel) + by_pixel) + of_pixels * self._weight("pixel", acc)[0]
        gx += naive.per_image(of_means / x[0, ..., 0].numel() if len(x) else of_means)
        found = {
            "pixel.weight": (of_pixels * x).sum((0, 1, 2, 3))[None], "pixel.bias": of_pixels.sum()[None],
            "excite.weight": of_excite.mT @ hidden, "excite.bias": of_excite.sum(0),
            "squeeze.weight": of_squeeze.mT @ means, "squeeze.bias": of_squeeze.sum(0),
        }  # fmt: skip
        named = {f"{self.name}.{key}": value for key, value in found.items()}
        return gx.to(dtype), {name: value.view_as(self.parameters[name]) for name, value in named.items()}

    def _scales(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The factors per channel `[N, C]` and per pixel `[N, D, H, W, 1]`, the means and what is squeezed of them."""
        means = x.mean((1, 2, 3))
        hidden = torch.addmm(self._bias("squeeze", x.dtype), means, self._weight("squeeze", x.dtype).mT).relu()
        by_channel = torch.addmm(self._bias("excite", x.dtype), hidden, self._weight("excite", x.dtype).mT).sigmoid()
        by_pixel = ((x * self._weight("pixel", x.dtype)[0]).sum(-1, keepdim=True) + self._bias("pixel", x.dtype)).sigmoid()
        return by_channel, by_pixel, means, hidden

    def _weight(self, part: str, dtype: torch.dtype) -> Tensor:
        return self.parameters[f"{self.name}.{part}.weight"].flatten(1).to(dtype)

    def _bias(self, part: str, dtype: torch.dtype) -> Tensor:
        return self.parameters[f"{self.name}.{part}.bias"].to(dtype)
