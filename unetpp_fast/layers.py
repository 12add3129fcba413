"""The parts of a node in plain PyTorch: the reference that every faster backend is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Option = str | tuple[str, Mapping[str, Any]]

NORMS = {"batch": {"eps", "momentum"}, "instance": {"eps"}}
ACTIVATIONS = {"relu": set(), "leaky_relu": {"negative_slope"}}
UPSAMPLES = {"deconv": set(), "nearest": {"project"}, "linear": {"align_corners", "project"}}


def parse_option(value: Option | None, what: str, allowed: Mapping[str, set[str]]) -> tuple[str, dict[str, Any]]:
    """Splits `"name"` or `("name", {keyword: value})`, checked against the names and keywords that exist."""
    named = isinstance(value, str)
    pair = isinstance(value, (tuple, list)) and len(value) == 2 and isinstance(value[1], Mapping)
    name, keywords = (value, {}) if named else (value[0], dict(value[1])) if pair else (value, {})
    if not isinstance(name, str) or name not in allowed:
        raise ValueError(f"{what}={value!r} is not known: use one of {sorted(allowed)} or a (name, {{keyword: value}}) pair")
    unknown = set(keywords) - allowed[name]
    if unknown:
        takes = f"it takes {sorted(allowed[name])}" if allowed[name] else "it takes none"
        raise ValueError(f"{what}={name!r} has no keyword {sorted(unknown)}: {takes}")
    return name, keywords


class InstanceNorm(nn.Module):
    """Instance norm over [N, C, *S] with a learned scale and shift, defined for an empty batch too."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # F.instance_norm fails on it
            shape = (1, -1) + (1,) * (x.ndim - 2)
            return x * self.weight.view(shape) + self.bias.view(shape)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


def make_norm(option: Option | None, channels: int, spatial_dims: int) -> nn.Module:
    """`None`, "batch" or "instance" over `channels`."""
    if option is None:
        return nn.Identity()
    name, keywords = parse_option(option, "norm", NORMS)
    if name == "instance":
        return InstanceNorm(channels, **keywords)
    return (nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d)(channels, **keywords)


def make_activation(option: Option) -> nn.Module:
    name, keywords = parse_option(option, "act", ACTIVATIONS)
    return nn.ReLU() if name == "relu" else nn.LeakyReLU(**keywords)


def make_conv(cin: int, cout: int, spatial_dims: int, kernel: int, bias: bool = True) -> nn.Module:
    conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    return conv(cin, cout, kernel, padding=kernel // 2, bias=bias)


class Interpolate(nn.Module):
    """Doubles every axis by nearest-neighbour or linear interpolation, after a 1x1 convolution if it projects."""

    def __init__(
        self, mode: str, cin: int, cout: int, spatial_dims: int, align_corners: bool = False, project: bool = False
    ):
        super().__init__()
        linear = {2: "bilinear", 3: "trilinear"}[spatial_dims]
        self.mode = linear if mode == "linear" else mode
        self.align_corners = bool(align_corners) if mode == "linear" else None
        self.project = make_conv(cin, cout, spatial_dims, 1) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.project(x), scale_factor=2, mode=self.mode, align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, align_corners={self.align_corners}"


def reduces_channels(option: Option) -> bool:
    """Whether an up-sampling chooses how many channels it hands over, or passes all of them on."""
    name, keywords = parse_option(option, "upsample", UPSAMPLES)
    return name == "deconv" or bool(keywords.get("project"))


def make_upsample(option: Option, cin: int, cout: int, spatial_dims: int) -> nn.Module:
    """[N, cin, *S] -> [N, cout, *2S]: 2x2 transposed convolution, nearest-neighbour or linear."""
    name, keywords = parse_option(option, "upsample", UPSAMPLES)
    if name == "deconv":
        deconv = nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d
        return deconv(cin, cout, kernel_size=2, stride=2)
    return Interpolate(name, cin, cout, spatial_dims, **keywords)


class NodeModule(nn.Module):
    """X(i,j): [conv 3x3, norm, activation, dropout] twice, over the prefix and the up-sampled node below.

    Shapes: prefix maps `[N, C_k, *S]`, low source `[N, C, *S/2]`, result `[N, width, *S]`.
    """

    def __init__(
        self,
        convolutions: tuple[tuple[int, int], tuple[int, int]],
        up: tuple[int, int] | None,
        spatial_dims: int,
        norm: Option | None,
        act: Option,
        upsample: Option,
        dropout: float,
        bias: bool,
    ):
        super().__init__()
        if up:
            self.up = make_upsample(upsample, *up, spatial_dims)
        (in1, out1), (in2, out2) = convolutions
        self.conv1 = make_conv(in1, out1, spatial_dims, 3, bias)
        self.norm1 = make_norm(norm, out1, spatial_dims)
        self.conv2 = make_conv(in2, out2, spatial_dims, 3, bias)
        self.norm2 = make_norm(norm, out2, spatial_dims)
        self.act = make_activation(act)
        self.dropout = nn.Dropout(dropout)

    def forward(self, prefix: list[Tensor], low: Tensor | None = None) -> Tensor:
        operands = prefix if low is None else [*prefix, self.up(low)]
        x = operands[0] if len(operands) == 1 else torch.cat(operands, dim=1)
        x = self.dropout(self.act(self.norm1(self.conv1(x))))
        return self.dropout(self.act(self.norm2(self.conv2(x))))


@torch.no_grad()
def initialise(module: nn.Module, act: Option) -> None:
    """He-normal weights before an activation (He et al., 2015, eq. 14), variance-preserving ones elsewhere, zero biases."""
    name, keywords = parse_option(act, "act", ACTIVATIONS)
    gain = nn.init.calculate_gain(name, keywords.get("negative_slope"))
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=(gain if layer.kernel_size[0] == 3 else 1.0) / math.sqrt(fan_in))
        elif isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
            # With stride = kernel each output pixel meets one tap: the fan-in is the channel count.
            nn.init.normal_(layer.weight, std=1.0 / math.sqrt(layer.in_channels))
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
