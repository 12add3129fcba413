"""UNet++, U-Net and the networks of the paper's comparison."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from ..architecture.options import Option, reduces_channels
from ..architecture.topology import Topology, check_features
from ..common.errors import InputError
from .encoder_network import EncodedNetwork
from .encoders import make_encoder
from .network import Network

PAPER_FEATURES = {
    "unet": (32, 64, 128, 256, 512),
    "wide_unet": (35, 70, 140, 280, 560),
    "unet++": (32, 64, 128, 256, 512),
}

AnyNetwork = Network | EncodedNetwork
ENCODER_OPTIONS = {"encoder_weights", "encoder_depth", "decoder_channels", "attention"}  # of `over_encoder` alone


class UNetPlusPlus(Network):
    """UNet++ (Zhou et al., 2018, https://arxiv.org/abs/1807.10165): U-Net with nested, dense skip pathways.

    It maps images `[N, in_channels, *S]`, floating point, to logits `[N, out_channels, *S]`: see `Network.forward`.

    Args:
        in_channels, out_channels: channels of the image and classes of the mask.
        spatial_dims: 2 or 3.
        features: width of each level, finest first; depth is `len(features) - 1` (1 to 6).
        norm: None (the paper), "batch", "instance" or `("group", {"num_groups": 8})`; `("batch", {"eps": 1e-3})` sets
            keywords.
        act: "relu", `("leaky_relu", {"negative_slope": 0.01})`, "prelu", "gelu" or "silu"; the last three, as group norm,
            run on the reference.
        upsample: "deconv" (2x2 transposed convolution to the level's width), "nearest" or "linear" (all channels are
            passed on), `("linear", {"align_corners": True})`. `"project": True` adds a 1x1 convolution to the level's
            width before the interpolation. "pixelshuffle": the channels of a 3x3 convolution
            become pixels (`architecture.layers.PixelShuffle`).
        dropout: probability, after each activation.
        deep_supervision: a head on every X(0,j), j >= 1, and a list of outputs; needed to prune.
        strides, kernels: None, or per axis the stride, 1 or 2, from each level to the next, and the taps, 1 or 3, at each
            level: for volumes of unlike axes, as `strides=[(1, 2, 2), (2, 2, 2)], kernels=[(1, 3, 3)] + [(3, 3, 3)] * 2`.
            Each axis of S must then be a multiple of its number of `multiples`.
        backend: "auto" or a name in `unetpp_fast.execution.dispatch.BACKENDS`.
        encoder: None, or what gives the first column of the grid: a name of timm (extra `encoders`) or a module that returns
            a pyramid of maps. The result is then an `EncodedNetwork`; `over_encoder` says what further arguments it takes.

    Raises:
        ValueError: an option, a width or a count is unknown or out of range; the message says what is allowed.
        TypeError: an argument of the other kind of network.
    """

    def __new__(cls, *args: Any, encoder: str | nn.Module | None = None, **options: Any) -> Any:
        if encoder is not None and "features" in options:
            raise TypeError("over an encoder the widths are its own and those of decoder_channels: leave features out")
        if encoder is None and (lost := sorted(ENCODER_OPTIONS & options.keys())):
            raise TypeError(f"{lost[0]} is for a network over an encoder: give one, such as encoder='resnet34'")
        return super().__new__(cls) if encoder is None else over_encoder(encoder, *args, **options)

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        spatial_dims: int = 2,
        features: Sequence[int] = (32, 64, 128, 256, 512),
        norm: Option | None = "batch",
        act: Option = "relu",
        upsample: Option = "deconv",
        dropout: float = 0.0,
        deep_supervision: bool = False,
        backend: str = "auto",
        strides: Sequence[Sequence[int]] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
        encoder: None = None,
    ):
        topology = Topology.nested(
            in_channels, features, spatial_dims=spatial_dims, all_heads=deep_supervision,
            up_width=_up_width(features, upsample),
        ).over_levels(strides, kernels)  # fmt: skip
        super().__init__(
            topology, out_channels, norm=norm, act=act, upsample=upsample, dropout=dropout,
            deep_supervision=deep_supervision, backend=backend,
        )  # fmt: skip


def over_encoder(
    encoder: str | nn.Module,
    in_channels: int = 3,
    out_channels: int = 1,
    *,
    encoder_weights: str | os.PathLike | None = None,
    encoder_depth: int = 5,
    decoder_channels: Sequence[int] = (256, 128, 64, 32, 16),
    spatial_dims: int = 2,
    norm: Option | None = "batch",
    act: Option = "relu",
    upsample: Option = "nearest",
    dropout: float = 0.0,
    attention: str | None = None,
    deep_supervision: bool = False,
    backend: str = "auto",
) -> EncodedNetwork:
    """UNet++ over an encoder, as `UNetPlusPlus(encoder=...)` makes it: layout, widths and defaults of smp's `UnetPlusPlus`.

    Args:
        encoder, encoder_weights, encoder_depth: `encoder`, `weights` and `depth` of `make_encoder`: a name of timm or a
            module; "imagenet", a file or None; the number of its maps, 2 to 7.
        decoder_channels: widths of X(i,depth - i), deepest first, then that of the last blocks at the image size; of more
            than `encoder_depth` the last ones. All other nodes are as wide as the encoder's map of their level; where that
            begins at 1/4 of the size, each X(0,j) is as wide as the last of them and reads X(1,j-1) alone.
        attention: None or "scse", gates on the input and output of each node.
        norm, act, upsample, dropout, backend: as in `UNetPlusPlus`; convolutions before a norm have no bias.
        deep_supervision: a last block and a head on every X(0,j), j >= 1, and a list of outputs; needed to prune.

    Raises:
        InputError: a ValueError; see `make_encoder`, or another argument does not fit.
    """
    if attention not in (None, "scse"):
        raise InputError(f'attention must be None or "scse", not {attention!r}')
    body, features = make_encoder(
        encoder, in_channels=in_channels, spatial_dims=spatial_dims, depth=encoder_depth, weights=encoder_weights
    )
    if len(decoder_channels) < encoder_depth or not all(isinstance(width, int) and width > 0 for width in decoder_channels):
        raise InputError(
            f"decoder_channels must be {encoder_depth} positive integers, one per map of the encoder, not"
            f" {decoder_channels!r}"
        )
    *widths, last_width = decoder_channels[-encoder_depth:]
    depth, starts_lower = encoder_depth - 1, not features[0]
    features = (widths[-1], *features[1:]) if starts_lower else features
    topology = Topology.nested(
        in_channels, features, spatial_dims=spatial_dims, all_heads=deep_supervision, up_width=_up_width(features, upsample),
        widths={(depth - 1 - place, place + 1): width for place, width in enumerate(widths)},
    )  # fmt: skip
    topology = topology.without_finest_map() if starts_lower else topology
    return EncodedNetwork(
        body, topology, last_width, out_channels, norm=norm, act=act, upsample=upsample, dropout=dropout, bias=norm is None,
        attention=attention is not None, deep_supervision=deep_supervision, backend=backend,
    )  # fmt: skip


def from_config(config: Mapping[str, Any], backend: str = "auto") -> Network | EncodedNetwork:
    """The network that a `config` describes, with new weights.

    Raises:
        InputError: it is over an encoder that no config describes, or that is not installed.
    """
    return (EncodedNetwork if "encoder" in config else Network).from_config(config, backend)


class UNet(Network):
    """U-Net (Ronneberger et al., 2015, https://arxiv.org/abs/1505.04597) on the same grid: the first column and the last
    diagonal.

    It maps images `[N, in_channels, *S]`, floating point, to logits `[N, out_channels, *S]`. Arguments and errors as in
    `UNetPlusPlus`.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        spatial_dims: int = 2,
        features: Sequence[int] = (32, 64, 128, 256, 512),
        norm: Option | None = "batch",
        act: Option = "relu",
        upsample: Option = "deconv",
        dropout: float = 0.0,
        backend: str = "auto",
        strides: Sequence[Sequence[int]] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
    ):
        topology = Topology.plain(in_channels, features, spatial_dims=spatial_dims, up_width=_up_width(features, upsample))
        topology = topology.over_levels(strides, kernels)
        super().__init__(topology, out_channels, norm=norm, act=act, upsample=upsample, dropout=dropout, backend=backend)


def from_paper(
    name: str,
    in_channels: int = 1,
    out_channels: int = 1,
    spatial_dims: int = 2,
    deep_supervision: bool = False,
) -> Network:
    """A network of the comparison in the paper of UNet++ (https://arxiv.org/abs/1807.10165, table 2): no norm, ReLU,
    dropout 0.5, transposed convolutions.

    Args:
        name: "unet" (7,759,521 parameters with one channel and one class), "wide_unet" (9,282,246; the paper
            prints 9.13 M) or "unet++" (9,041,601 with one head).
        in_channels, out_channels, spatial_dims: as in `UNetPlusPlus`.
        deep_supervision: heads on X(0,1)..X(0,4); "unet++" only.

    Raises:
        ValueError: there is no such network, or another than "unet++" is to have deep supervision.
    """
    if name not in PAPER_FEATURES:
        raise ValueError(f"from_paper knows {sorted(PAPER_FEATURES)}, not {name!r}")
    options: dict[str, Any] = {"spatial_dims": spatial_dims, "features": PAPER_FEATURES[name], "norm": None, "dropout": 0.5}
    if name == "unet++":
        return UNetPlusPlus(in_channels, out_channels, deep_supervision=deep_supervision, **options)
    if deep_supervision:
        raise ValueError(f"deep_supervision needs the nested nodes of 'unet++'; {name!r} has one head")
    return UNet(in_channels, out_channels, **options)


def _up_width(features: Sequence[int], upsample: Option) -> Callable[[int, int], int]:
    check_features(features)
    if reduces_channels(upsample):
        return lambda low_width, level: features[level]
    return lambda low_width, level: low_width


def parameter_count(model: nn.Module) -> int:
    """The number of trainable parameters of `model`, any module, each shared one once; frozen ones are not counted."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
