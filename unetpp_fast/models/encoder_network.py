"""UNet++ over any encoder: the first column of the grid is another library's module, the rest is ours.

The layout is that of segmentation_models_pytorch (smp): the encoder returns maps at 1/2, 1/4, ... of the image size; the
nest spans them; a last block without a skip connection brings X(0,depth) to the image size, and a 3x3 head follows.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.layers import NodeModule, initialise, make_conv
from ..architecture.options import Option
from ..architecture.output_forms import FORMS, check_form
from ..architecture.topology import Topology
from .prediction import check_image, crop, evaluating, mean_probabilities, pad_to_multiple


class ChannelSpatialGate(nn.Module):
    """The input scaled per channel plus the input scaled per pixel (scSE; Roy et al., 2018): `[N, C, *S]` to the same."""

    def __init__(self, channels: int, spatial_dims: int, reduction: int = 16):
        super().__init__()
        self.squeeze = make_conv(channels, channels // reduction, spatial_dims, 1)
        self.excite = make_conv(channels // reduction, channels, spatial_dims, 1)
        self.pixel = make_conv(channels, 1, spatial_dims, 1)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
        by_channel = self.excite(self.squeeze(means).relu()).sigmoid()
        return x * by_channel + x * self.pixel(x).sigmoid()


class GatedNode(NodeModule):
    """A node with a `ChannelSpatialGate` on the input of its first convolution, if that includes a skip connection, and one
    on its output."""

    def __init__(self, convolutions: tuple, up: tuple[int, int], spatial_dims: int, **options):
        super().__init__(convolutions, up, spatial_dims, **options)
        (inputs, width), _ = convolutions
        self.attention1 = ChannelSpatialGate(inputs, spatial_dims)
        self.attention2 = ChannelSpatialGate(width, spatial_dims)

    def forward(self, prefix: list[Tensor], low: Tensor | None = None) -> Tensor:
        x = self.join(prefix, low)
        return self.attention2(self.convolve(self.attention1(x) if prefix else x))


class EncodedNetwork(nn.Module):
    """A nest over the maps of an encoder.

    Args:
        encoder: maps `[N, C, *S]` to a list of `[N, C_k, *S / 2^k]`, k = 0, 1, ... `topology.depth` + 1. The first, at the
            image size, is not used.
        topology: the nest; its level i has the encoder's map at 1/2^(i+1), and its column 0 is the encoder's.
        last_width: channels of the last block, at the image size.
        out_channels: classes of the mask.
        norm, act, upsample, bias: as in `Network`; `attention` adds gates to every node.
        form: how `forward` returns the logits, a name in `unetpp_fast.architecture.output_forms`.
        unused: a module kept for its weights and never run.
    """

    def __init__(
        self,
        encoder: nn.Module,
        topology: Topology,
        last_width: int,
        out_channels: int = 1,
        *,
        norm: Option | None = "batch",
        act: Option = "relu",
        upsample: Option = "nearest",
        bias: bool = False,
        attention: bool = False,
        form: str = "plain",
        unused: nn.Module | None = None,
    ):
        super().__init__()
        self.topology, self.out_channels, self.form = topology, out_channels, check_form(form)
        self.options = {"norm": norm, "act": act, "upsample": upsample, "dropout": 0.0, "bias": bias}
        dims, kind = topology.spatial_dims, GatedNode if attention else NodeModule
        self.nodes = nn.ModuleDict()
        for node in topology.nodes:
            if node.column:
                up = (topology.low_width(node), node.up_width)
                self.nodes[node.name] = kind(topology.convolutions(node), up, dims, **self.options)
        width = topology[0, topology.depth].width
        self.last = kind(((width, last_width), (last_width, last_width)), (width, width), dims, **self.options)
        self.head = make_conv(last_width, out_channels, dims, 3)
        initialise(self, act)
        self.encoder, self.unused = encoder, unused

    @property
    def multiple(self) -> int:
        """Every spatial axis of the image must be a multiple of this."""
        return 2 * self.topology.multiple

    def forward(self, x: Tensor) -> Tensor:
        """The map `[N, out_channels, *S]` for `[N, C, *S]`: logits, or their form (`form`).

        Raises:
            TypeError, ValueError: x has the wrong type, rank or channels, or a size that is not a multiple of `multiple`.
        """
        check_input(self, x, any_size=True)
        if any(size % self.multiple for size in x.shape[2:]):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(
                f"size {size} does not fit: every axis must be a multiple of {self.multiple}; predict() pads and"
                " crops any size"
            )
        return FORMS[self.form]([self.logits(x)], False)

    def logits(self, x: Tensor) -> Tensor:
        """`[N, out_channels, *S]` for an image size that is a multiple of `multiple`."""
        features = self.encoder(x)[1:]
        maps = {(level, 0): feature for level, feature in enumerate(features)}
        for node in self.topology.nodes:
            if node.column:
                prefix = [maps[node.level, column] for column in node.prefix]
                maps[node.position] = self.nodes[node.name](prefix, maps[node.low])
        return self.head(self.last([], maps[0, self.topology.depth]))

    def predict(self, x: Tensor, activation: str = "sigmoid") -> Tensor:
        """Probabilities `[N, out_channels, *S]` for any size: padded and cropped inside, in eval mode, without gradients.

        activation: "sigmoid" (classes overlap) or "softmax" (classes exclude one another).
        """
        check_image(self, x, activation)
        with evaluating(self):
            return mean_probabilities([crop(self.logits(pad_to_multiple(x, self.multiple)), x.shape[2:])], activation)
