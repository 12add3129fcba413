"""UNet++ over any encoder: the first column of the grid is another library's module, the rest is ours.

The layout is that of segmentation_models_pytorch (smp): the encoder returns maps at 1/2, 1/4, ... of the image size; the
nest spans them; a last block without a skip connection brings X(0,depth) to the image size, and a 3x3 head follows.
The encoder runs in PyTorch, the rest by any backend (`Nest`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.layers import NodeModule, initialise, make_conv
from ..architecture.options import Option
from ..architecture.output_forms import FORMS, check_form
from ..architecture.topology import Topology
from ..execution import dispatch
from ..execution.fused.structure import structure_of
from .prediction import check_image, crop, evaluating, mean_probabilities, pad_to_multiple
from .pretrained import Pretrained


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


class Nest(nn.Module):
    """All of an `EncodedNetwork` but its encoder, on the same modules, as the backends take it (`NetworkSpec`): a network
    whose input are the encoder's maps.

    Its levels are counted from the image's size, so node x0_1 of the `EncodedNetwork` is X(1,1) here, and its last block
    X(0,depth + 1) (`Topology.over_maps`).
    """

    def __init__(self, whole: EncodedNetwork):
        super().__init__()
        nodes, last_width = whole.topology.nodes, whole.last.conv2.out_channels
        self.topology, self.out_channels = whole.topology.over_maps(last_width), whole.out_channels
        attention = isinstance(whole.last, GatedNode)
        unused = {"odd_sizes": False, "downsample": "pool", "head_bias": True}
        self.options = {**whole.options, **unused, "attention": attention, "head_taps": 3}
        self.follow(whole)
        last = self.topology.nodes[-1].name
        inner = {f"x{node.level + 1}_{node.column}": whole.nodes[node.name] for node in nodes if node.column}
        self.nodes, self.heads = nn.ModuleDict({**inner, last: whole.last}), nn.ModuleDict({last: whole.head})
        self.refresh_handle()

    def refresh_handle(self) -> None:
        """As `Network.refresh_handle`."""
        self.structure = structure_of(self)

    def follow(self, whole: EncodedNetwork) -> None:
        """Takes over the settings of `whole` that have changed; a graph can hold it only where none has."""
        for name in ("backend", "training", "sync_group", "recompute"):
            if getattr(self, name, None) != getattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def is_of(self, whole: EncodedNetwork) -> bool:
        """Whether these are still the modules of `whole`."""
        theirs = [*whole.nodes.values(), whole.last, whole.head]
        mine = [*self.nodes.values(), *self.heads.values()]
        return len(mine) == len(theirs) and all(one is other for one, other in zip(mine, theirs, strict=True))


class EncodedNetwork(Pretrained, nn.Module):
    """A nest over the maps of an encoder.

    Args:
        encoder: maps `[N, C, *S]` to a list of `[N, C_k, *S / 2^k]`, k = 0, 1, ... `topology.depth` + 1. The first, at the
            image size, is not used.
        topology: the nest; its level i has the encoder's map at 1/2^(i+1), and its column 0 is the encoder's.
        last_width: channels of the last block, at the image size.
        out_channels: classes of the mask.
        norm, act, upsample, bias: as in `Network`; `attention` adds gates to every node.
        form: how `forward` returns the logits, a name in `unetpp_fast.architecture.output_forms`.
        backend: of everything but the encoder, as in `Network`.
        unused: a module kept for its weights and never run.
    """

    sync_group, recompute = "", False  # as in `Network`

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
        backend: str = "auto",
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
        self.backend = dispatch.check(backend)
        self.refresh_handle()

    def refresh_handle(self) -> None:
        """As `Network.refresh_handle`."""
        self._nests = (Nest(self),)  # a tuple, or it would be a part

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_nests"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.refresh_handle()

    def train(self, mode: bool = True) -> EncodedNetwork:
        super().train(mode)
        self.nest.follow(self)
        return self

    @property
    def nest(self) -> Nest:
        """What the backends compute; made again after a node was replaced."""
        if not self._nests[0].is_of(self):
            self.refresh_handle()
        self._nests[0].follow(self)
        return self._nests[0]

    @property
    def multiple(self) -> int:
        """Every spatial axis of the image must be a multiple of this."""
        return 2 * self.topology.multiple

    def forward(self, x: Tensor) -> Tensor:
        """The map `[N, out_channels, *S]` for `[N, C, *S]`: logits, or their form (`form`).

        Raises:
            TypeError, ValueError: x has the wrong type, rank or channels, or a size that is not a multiple of `multiple`.
        """
        self.check(x)
        return FORMS[self.form]([self.logits(x)], False)

    def check(self, x: Tensor) -> None:
        """Raises one clear error if the network does not take `x`."""
        check_input(self, x, any_size=True)
        if any(size % self.multiple for size in x.shape[2:]):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(
                f"size {size} does not fit: every axis must be a multiple of {self.multiple}; predict() pads and"
                " crops any size"
            )

    def logits(self, x: Tensor) -> Tensor:
        """`[N, out_channels, *S]` for an image size that is a multiple of `multiple`."""
        return dispatch.forward(self.nest, self.maps(x))[0]

    def maps(self, x: Tensor) -> list[Tensor]:
        """The encoder's maps that the nest reads: `[N, C_k, *S / 2^k]`, k = 1, 2, ... `topology.depth` + 1.

        Raises:
            ValueError: the encoder gives other maps.
        """
        maps = list(self.encoder(x))[1:]
        if torch.compiler.is_compiling():  # a comparison would fix the sizes of a graph
            return maps
        expected = []
        for level in range(self.topology.depth + 1):
            size = [side >> (level + 1) for side in x.shape[2:]]
            expected.append((x.shape[0], self.topology[level, 0].width, *size))
        if [tuple(one.shape) for one in maps] != expected:
            given = [tuple(one.shape) for one in maps]
            raise ValueError(f"the encoder gives maps of {given} after the first, the nest takes {expected}")
        return maps

    def sample(self) -> Tensor:
        """A small image that the network takes, of noise."""
        weight, topology = self.head.weight, self.topology
        size = [self.multiple * -(-64 // self.multiple)] * topology.spatial_dims
        noise = torch.randn(1, topology.in_channels, *size, generator=torch.Generator().manual_seed(0))
        return noise.to(weight)

    def engine_input(self, x: Tensor) -> tuple[Nest, list[Tensor]]:
        """What the backends compute for an image `x`, which is checked: the nest over the encoder's maps.

        The encoder runs in eval mode, so that its statistics stay; its maps ask for gradients if it is trained.
        """
        self.check(x)
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.encoder.parameters())
        with evaluating(self.encoder):
            maps = self.maps(x)
        return self.nest, [one.detach().requires_grad_(trained) for one in maps]

    def predict(self, x: Tensor, activation: str = "sigmoid") -> Tensor:
        """Probabilities `[N, out_channels, *S]` for any size: padded and cropped inside, in eval mode, without gradients.

        activation: "sigmoid" (classes overlap) or "softmax" (classes exclude one another).
        """
        check_image(self, x, activation)
        with evaluating(self):
            return mean_probabilities([crop(self.logits(pad_to_multiple(x, self.multiple)), x.shape[2:])], activation)
