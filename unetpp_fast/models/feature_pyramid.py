"""The maps of UNet++ as a feature pyramid, for detectors such as torchvision's Mask R-CNN, which the paper suggests."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.layers import make_conv
from ..architecture.wrappers import network_of
from ..execution import reference
from .network import Network
from .own_forward import own_forward

OUT_CHANNELS = 256  # as torchvision's feature pyramid networks


class Backbone(nn.Module):
    """X(0,d), X(1,d-1), ..., X(d,0) of a network of depth d as an ordered dictionary "0", "1", ..., finest first.

    Computed by the reference backend without the heads; differentiable, 2D and 3D. The nodes are those of the model, not
    copies.

    Args:
        model: the network whose last diagonal is returned; of a pruned one, the diagonal that is left.
        out_channels: of every map, by a 1x1 convolution each, because detectors share one head. None: 256, or the common
            width, without convolutions, if all maps have the same width.

    Attributes:
        out_channels: as above; torchvision reads it.

    Raises:
        ValueError: a node of the diagonal is missing, as in some converted models; or the model has hooks or a `forward` of
            its own, which would not run.
    """

    def __init__(self, model: Network, out_channels: int | None = None):
        super().__init__()
        model = network_of(model, "backbone")
        if not isinstance(model, Network):
            raise TypeError(f"a pyramid is of a network without an encoder, not of {type(model).__name__}")
        if why := own_forward(model):
            raise ValueError(f"{why}, which a pyramid would leave out: put it before the backbone")
        topology = model.topology
        positions = {node.position: node.width for node in topology.nodes}
        self.diagonal = [(level, topology.depth - level) for level in range(topology.depth + 1)]
        missing = [position for position in self.diagonal if position not in positions]
        if missing:
            raise ValueError(f"this network has no node X{missing[0]}: a pyramid needs X(0,d), X(1,d-1), ..., X(d,0)")
        self.network = model.subnetwork(topology, deep_supervision=False)
        self.network.heads = nn.ModuleDict()  # DistributedDataParallel does not accept unused parameters
        widths = [positions[position] for position in self.diagonal]
        alike = set(widths) == {out_channels or widths[0]}
        self.out_channels = out_channels or (widths[0] if alike else OUT_CHANNELS)
        self.lateral = nn.ModuleList(nn.Identity() if alike else self._lateral(width) for width in widths)

    def _lateral(self, width: int) -> nn.Module:
        conv = make_conv(width, self.out_channels, self.network.topology.spatial_dims, 1)
        nn.init.kaiming_uniform_(conv.weight, a=1)  # as in feature pyramid networks: no activation follows
        nn.init.zeros_(conv.bias)
        return conv

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """`[N, out_channels, *S / 2^i]` by the name of each level i, for `[N, in_channels, *S]` with S multiples of 2^d.

        Raises:
            TypeError, ValueError: as `Network.forward`.
        """
        check_input(self.network, x)
        maps = reference.node_maps(self.network, x)
        pairs = zip(self.diagonal, self.lateral, strict=True)
        return OrderedDict((str(position[0]), conv(maps[position])) for position, conv in pairs)


def backbone(model: Network, out_channels: int | None = None) -> Backbone:
    """The feature pyramid of a model, for torchvision's `MaskRCNN(backbone, num_classes)`; the paper of UNet++
    (https://arxiv.org/abs/1807.10165) suggests the pair.

    The module maps `[N, in_channels, *S]`, floating point, to `[N, out_channels, *S / 2^i]` by the name of each level i: the
    last diagonal X(0,d), X(1,d-1), ..., X(d,0) of a network of depth d.

    Args:
        model: the network, whose nodes it shares.
        out_channels: of every map, by a 1x1 convolution each. None: 256, or the common width, without convolutions, if all
            maps have the same width.

    Raises:
        TypeError: the network is over an encoder. ValueError: a node of the diagonal is missing, or the model has hooks or a
            `forward` of its own.
    """
    return Backbone(model, out_channels)
