"""Gates that scale a map by what it contains, and the node that has them (smp's scSE)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import NodeModule, make_conv


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
    """A node with a `ChannelSpatialGate` on its output, and one on the input of its first convolution, which a node that is
    not `gated_input` has and never runs, as smp's last block."""

    def __init__(self, convolutions: tuple, up: tuple[int, int], spatial_dims: int, *, gated_input: bool = True, **options):
        super().__init__(convolutions, up, spatial_dims, **options)
        self.gated_input = gated_input
        (inputs, width), _ = convolutions
        self.attention1 = ChannelSpatialGate(inputs, spatial_dims)
        self.attention2 = ChannelSpatialGate(width, spatial_dims)

    def forward(self, prefix: list[Tensor], low: Tensor | None = None) -> Tensor:
        x = self.join(prefix, low)
        return self.attention2(self.convolve(self.attention1(x) if self.gated_input else x))
