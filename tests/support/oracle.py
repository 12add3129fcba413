"""UNet++ and U-Net written straight from equation 1, without the package: what the models are compared with.

Only convolution comes from torch. Pooling, up-sampling, norms and activations are spelled out from their definitions.
`state` is a state_dict of a network, whose keys are part of what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Oracle:
    """The operations of one network: H, pooling, up-sampling and heads, with the weights of `state`."""

    state: Mapping[str, Tensor]
    norm: str | None = None
    slope: float = 0.0
    upsample: str = "deconv"
    up: dict[str, Any] = field(default_factory=dict)
    training: bool = True
    eps: float = 1e-5

    def nested_depth_2(self, x: Tensor) -> list[Tensor]:
        """Every node of a UNet++ of three levels, one a line."""
        x00 = self.h("x0_0", x)
        x10 = self.h("x1_0", pool(x00))
        x20 = self.h("x2_0", pool(x10))
        x01 = self.h("x0_1", x00, self.raised("x0_1", x10))
        x11 = self.h("x1_1", x10, self.raised("x1_1", x20))
        x02 = self.h("x0_2", x00, x01, self.raised("x0_2", x11))
        return [self.head("x0_1", x01), self.head("x0_2", x02)]

    def plain_depth_2(self, x: Tensor) -> Tensor:
        """Every node of a U-Net of three levels."""
        x00 = self.h("x0_0", x)
        x10 = self.h("x1_0", pool(x00))
        x20 = self.h("x2_0", pool(x10))
        x11 = self.h("x1_1", x10, self.raised("x1_1", x20))
        x02 = self.h("x0_2", x00, self.raised("x0_2", x11))
        return self.head("x0_2", x02)

    def nested(self, x: Tensor, depth: int) -> list[Tensor]:
        """Equation 1 as it is printed, by recursion, at any depth."""

        @cache
        def node(i: int, j: int) -> Tensor:
            name = f"x{i}_{j}"
            if j == 0:
                return self.h(name, pool(node(i - 1, 0)) if i else x)
            return self.h(name, *[node(i, k) for k in range(j)], self.raised(name, node(i + 1, j - 1)))

        return [self.head(f"x0_{j}", node(0, j)) for j in range(1, depth + 1)]

    def h(self, node: str, *operands: Tensor) -> Tensor:
        x = torch.cat(operands, dim=1)
        for k in (1, 2):
            x = self.normalised(f"nodes.{node}.norm{k}", self.conv(f"nodes.{node}.conv{k}", x, padding=1))
            x = torch.maximum(x, self.slope * x)
        return x

    def head(self, node: str, x: Tensor) -> Tensor:
        return self.conv(f"heads.{node}", x, padding=0)

    def conv(self, name: str, x: Tensor, padding: int) -> Tensor:
        convolve: Callable = F.conv2d if x.ndim == 4 else F.conv3d
        return convolve(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], padding=padding)

    def normalised(self, name: str, x: Tensor) -> Tensor:
        if self.norm is None:
            return x
        wide = x.double() if x.dtype == torch.float64 else x.float()
        spatial = tuple(range(2, x.ndim))
        if self.norm == "batch" and not self.training:
            mean, variance = (channels(self.state[f"{name}.running_{what}"], x.ndim) for what in ("mean", "var"))
        else:
            over = spatial if self.norm == "instance" else (0, *spatial)
            mean = wide.mean(over, keepdim=True)
            variance = ((wide - mean) ** 2).mean(over, keepdim=True)
        scale, shift = (channels(self.state[f"{name}.{what}"], x.ndim) for what in ("weight", "bias"))
        return ((wide - mean) / torch.sqrt(variance + self.eps) * scale + shift).to(x.dtype)

    def raised(self, node: str, x: Tensor) -> Tensor:
        """Twice the size along every axis."""
        if self.upsample == "deconv":
            return self.deconv(f"nodes.{node}.up", x)
        if self.up.get("project"):
            x = self.conv(f"nodes.{node}.up.project", x, padding=0)
        for axis in range(2, x.ndim):
            x = x.repeat_interleave(2, axis) if self.upsample == "nearest" else self.linear(x, axis)
        return x

    def deconv(self, name: str, x: Tensor) -> Tensor:
        """Each pixel becomes a 2x2 (x2) block: out[o, 2y + a, 2x + b] = bias[o] + sum_c in[c, y, x] weight[c, o, a, b]."""
        weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
        if x.ndim == 4:
            blocks = torch.einsum("nchw,coab->nohawb", x, weight)
        else:
            blocks = torch.einsum("ncdhw,coabe->nodahbwe", x, weight)
        size = [2 * axis for axis in x.shape[2:]]
        return blocks.reshape(x.shape[0], weight.shape[1], *size) + channels(bias, x.ndim).to(blocks.dtype)

    def linear(self, x: Tensor, axis: int) -> Tensor:
        """Linear interpolation along one axis, clamped at the ends; corners aligned or half-pixel centres."""
        n = x.shape[axis]
        places = torch.arange(2 * n, dtype=torch.float64)
        if self.up.get("align_corners"):
            source = places * ((n - 1) / (2 * n - 1))
        else:
            source = ((places + 0.5) / 2 - 0.5).clamp(min=0.0)
        left = source.floor().long().clamp(max=n - 1)
        right = (left + 1).clamp(max=n - 1)
        weight = (source - left).to(x.dtype)
        shape = [1] * x.ndim
        shape[axis] = 2 * n
        weight = weight.view(shape)
        return x.index_select(axis, left) * (1 - weight) + x.index_select(axis, right) * weight


def pool(x: Tensor) -> Tensor:
    """The largest of each 2x2 (x2) block."""
    for axis in range(2, x.ndim):
        x = x.unflatten(axis, (x.shape[axis] // 2, 2)).amax(axis + 1)
    return x


def channels(values: Tensor, ndim: int) -> Tensor:
    return values.view(1, -1, *[1] * (ndim - 2))
