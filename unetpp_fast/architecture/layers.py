"""The layers of a node in plain PyTorch: the reference by which every faster backend is judged."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .options import ACTIVATIONS, NORMS, UPSAMPLES, Option, parse_option


class InstanceNorm(nn.Module):
    """Instance norm over [N, C, *S], with learned scale and shift if `affine`; an empty batch is allowed."""

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True):
        super().__init__()
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] == 0:  # F.instance_norm fails on it
            if self.weight is None or self.bias is None:
                return x
            shape = (1, -1) + (1,) * (x.ndim - 2)
            return x * self.weight.view(shape) + self.bias.view(shape)
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}" + ("" if self.weight is not None else ", affine=False")


def make_norm(option: Option | None, channels: int, spatial_dims: int) -> nn.Module:
    """The layer of a norm in `options.NORMS` over `channels`; an identity for None."""
    if option is None:
        return nn.Identity()
    name, keywords = parse_option(option, "norm", NORMS)
    if name == "instance":
        return InstanceNorm(channels, **keywords)
    if name == "group":
        groups = keywords["num_groups"]
        if not isinstance(groups, int) or groups < 1 or channels % groups:
            raise ValueError(
                f"group norm splits {channels} channels into num_groups={groups!r}: choose a divisor of all widths"
            )
        return nn.GroupNorm(num_channels=channels, **keywords)
    return (nn.BatchNorm2d if spatial_dims == 2 else nn.BatchNorm3d)(channels, **keywords)


def make_activation(option: Option) -> nn.Module:
    """The layer of an activation in `options.ACTIVATIONS`."""
    name, keywords = parse_option(option, "act", ACTIVATIONS)
    return ACTIVATIONS[name].layer(**keywords)


def is_learned(option: Option) -> bool:
    """Whether an activation has parameters of its own."""
    return ACTIVATIONS[parse_option(option, "act", ACTIVATIONS)[0]].learned


PerAxis = int | tuple[int, ...]


def make_conv(cin: int, cout: int, spatial_dims: int, kernel: PerAxis, bias: bool = True, stride: PerAxis = 1) -> nn.Module:
    conv: Any = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
    padding = kernel // 2 if isinstance(kernel, int) else tuple(taps // 2 for taps in kernel)
    return conv(cin, cout, kernel, stride=stride, padding=padding, bias=bias)


class Interpolate(nn.Module):
    """Enlarges every axis by its factor, by nearest-neighbour or linear interpolation, after a 1x1 convolution if
    `project`."""

    def __init__(
        self,
        mode: str,
        cin: int,
        cout: int,
        spatial_dims: int,
        align_corners: bool = False,
        project: bool = False,
        factors: PerAxis = 2,
    ):
        super().__init__()
        self.factors = factors if isinstance(factors, int) else tuple(map(float, factors))
        linear = {2: "bilinear", 3: "trilinear"}[spatial_dims]
        self.mode = linear if mode == "linear" else mode
        self.align_corners = bool(align_corners) if mode == "linear" else None
        self.project = make_conv(cin, cout, spatial_dims, 1) if project else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.project(x), scale_factor=self.factors, mode=self.mode, align_corners=self.align_corners)

    def extra_repr(self) -> str:
        return f"mode={self.mode}, align_corners={self.align_corners}, factors={self.factors}"


class PixelShuffle(nn.Module):
    """Doubles every axis with a 3x3 convolution to 2^d times the channels, whose values become the new pixels, and a 2x2
    mean against checkerboard artefacts (Aitken et al., 2017), padded with zeros before the first pixel."""

    def __init__(self, cin: int, cout: int, spatial_dims: int):
        super().__init__()
        self.conv = make_conv(cin, cout * 2**spatial_dims, spatial_dims, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, dims = self.conv(x), x.ndim - 2
        factors = x.unflatten(1, (-1, *[2] * dims))  # [N, cout, 2.., *S]
        interleaved = [axis for i in range(dims) for axis in (2 + dims + i, 2 + i)]
        doubled = [2 * size for size in x.shape[2:]]
        x = factors.permute(0, 1, *interleaved).reshape(*factors.shape[:2], *doubled)
        pool = F.avg_pool2d if dims == 2 else F.avg_pool3d
        return pool(F.pad(x, (1, 0) * dims), 2, stride=1)


def make_upsample(option: Option, cin: int, cout: int, spatial_dims: int, factors: PerAxis = 2) -> nn.Module:
    """The layer of an up-sampling in `options.UPSAMPLES`: [N, cin, *S] -> [N, cout, *2S], or by other factors per axis.

    Raises:
        ValueError: pixelshuffle with another factor than 2.
    """
    name, keywords = parse_option(option, "upsample", UPSAMPLES)
    if name == "deconv":
        deconv: Any = nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d
        return deconv(cin, cout, kernel_size=factors, stride=factors, **keywords)
    if name == "pixelshuffle":
        if factors != 2:
            raise ValueError(f"pixelshuffle doubles every axis, and strides ask for {factors}: use another upsample")
        return PixelShuffle(cin, cout, spatial_dims)
    return Interpolate(name, cin, cout, spatial_dims, factors=factors, **keywords)


class NodeModule(nn.Module):
    """X(i,j): [conv 3x3, norm, activation, dropout] twice, over the prefix and the up-sampled node below.

    Shapes: prefix maps `[N, C_k, *S]`, low source `[N, C, *S/2]`, result `[N, width, *S]`. With `stride` 2 the first
    convolution halves every axis; with `odd_sizes` the up-sampled map repeats its last pixel where S is odd. `kernel`,
    `stride` and `factors`, by which the low source is enlarged, may differ between axes.
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
        stride: PerAxis = 1,
        odd_sizes: bool = False,
        kernel: PerAxis = 3,
        factors: PerAxis = 2,
    ):
        super().__init__()
        self.odd_sizes = odd_sizes
        if up:
            self.up = make_upsample(upsample, *up, spatial_dims, factors)
        (in1, out1), (in2, out2) = convolutions
        self.conv1 = make_conv(in1, out1, spatial_dims, kernel, bias, stride)
        self.norm1 = make_norm(norm, out1, spatial_dims)
        self.conv2 = make_conv(in2, out2, spatial_dims, kernel, bias)
        self.norm2 = make_norm(norm, out2, spatial_dims)
        self.act = make_activation(act)
        self.act2 = make_activation(act) if is_learned(act) else None  # else both convolutions have the one before
        self.dropout = nn.Dropout(dropout)

    def forward(self, prefix: list[Tensor], low: Tensor | None = None) -> Tensor:
        return self.convolve(self.join(prefix, low))

    def join(self, prefix: list[Tensor], low: Tensor | None) -> Tensor:
        """The input of the first convolution: the prefix, then the up-sampled low source, in one tensor."""
        operands = list(prefix)
        if low is not None:
            up = self.up(low)
            if self.odd_sizes and up.shape[2:] != prefix[0].shape[2:]:
                missing = [have - got for have, got in zip(prefix[0].shape[2:], up.shape[2:], strict=True)]
                up = F.pad(up, [amount for axis in reversed(missing) for amount in (0, axis)], mode="replicate")
            operands.append(up)
        return operands[0] if len(operands) == 1 else torch.cat(operands, dim=1)

    def convolve(self, x: Tensor) -> Tensor:
        """Both convolutions, each with norm, activation and dropout."""
        x = self.dropout(self.act(self.norm1(self.conv1(x))))
        return self.dropout((self.act if self.act2 is None else self.act2)(self.norm2(self.conv2(x))))


@torch.no_grad()
def initialise(module: nn.Module, act: Option) -> None:
    """He-normal weights before an activation (He et al., 2015, eq. 14), variance-preserving ones elsewhere, zero biases."""
    name, keywords = parse_option(act, "act", ACTIVATIONS)
    gain = ACTIVATIONS[name].gain(keywords)
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            fan_in = layer.weight[0].numel()
            nn.init.normal_(layer.weight, std=(gain if max(layer.kernel_size) == 3 else 1.0) / math.sqrt(fan_in))
        elif isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
            # With stride = kernel each output pixel meets one tap: the fan-in is the channel count.
            nn.init.normal_(layer.weight, std=1.0 / math.sqrt(layer.in_channels))
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    for layer in module.modules():
        if isinstance(layer, PixelShuffle):  # equal filters within a group: no checkerboard at the start
            group = 2 ** (layer.conv.weight.ndim - 2)
            layer.conv.weight.copy_(layer.conv.weight[::group].repeat_interleave(group, dim=0))
