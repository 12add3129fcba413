"""UNet++ over any encoder: the first column of the grid is another library's module, the rest is ours.

The layout is that of segmentation_models_pytorch (smp): the encoder returns maps at 1/2, 1/4, ... of the image size; the
nest spans them; a last block without a skip connection brings X(0,depth) to the image size, and a 3x3 head follows. With
deep supervision each X(0,j) has a last block and a head of its own, so that the network pruned to level j is what smp builds
over an encoder of j + 1 maps. The encoder runs in PyTorch, the rest by any backend (`Nest`).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..architecture.gates import GatedNode
from ..architecture.input_checks import check_input
from ..architecture.layers import NodeModule, initialise, make_conv
from ..architecture.options import Option, learned_upsample
from ..architecture.output_forms import FORMS, Outputs, check_form
from ..architecture.topology import Topology
from ..common.errors import InputError
from ..execution import dispatch
from ..execution.built import Built, changed
from . import prediction
from .encoder_parts import Encoder, truncated
from .encoders import make_encoder
from .nest import Nest
from .own_forward import check_prunable, own_forward, sharing
from .prediction import evaluating
from .pretrained import TRAINED_ON, Pretrained
from .recomputed import recomputing


class EncodedNetwork(Pretrained, nn.Module):
    """A nest over the maps of an encoder: what `UNetPlusPlus(encoder=...)` and, for smp's networks, `convert` build.

    Args:
        encoder: maps `[N, C, *S]` to a list of `[N, C_k, *S / 2^k]`, k = 0, 1, ... `topology.depth` + 1. The first, at the
            image size, is not used, nor is the second where the topology has no X(0,0): C_1 is 0 then.
        topology: the nest; its level i has the encoder's map at 1/2^(i+1), and its column 0 is the encoder's.
        last_width: channels of the last blocks, at the image size.
        out_channels: classes of the mask.
        norm, act, upsample, dropout, bias: as in `Network`; `attention` adds gates to every node.
        deep_supervision: return a list of logits, one per head of the topology.
        form: how `forward` returns the logits, a name in `unetpp_fast.architecture.output_forms`.
        backend: of everything but the encoder, as in `Network`.
        unused: a module kept for its weights and never run.
    """

    over_encoder, sync_group, recompute = True, "", False  # as in `Network`

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
        dropout: float = 0.0,
        bias: bool = False,
        attention: bool = False,
        deep_supervision: bool = False,
        form: str = "plain",
        backend: str = "auto",
        unused: nn.Module | None = None,
    ):
        super().__init__()
        self.topology, self.out_channels, self.last_width = topology, out_channels, last_width
        self.form, self.deep_supervision, self.attention = check_form(form), deep_supervision, attention
        self.options: dict[str, Any] = {"norm": norm, "act": act, "upsample": upsample, "dropout": dropout, "bias": bias}
        dims, kind = topology.spatial_dims, GatedNode if attention else NodeModule
        self.nodes = nn.ModuleDict()
        for node in topology.nodes:
            if node.column:
                up = (topology.low_width(node), node.up_width)
                self.nodes[node.name] = kind(topology.convolutions(node), up, dims, **self.options)
        self.lasts, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for node in (topology[0, column] for column in topology.heads):
            convolutions = (node.width, last_width), (last_width, last_width)
            gated: dict[str, Any] = {"gated_input": False} if attention else {}
            self.lasts[node.name] = kind(convolutions, (node.width, node.width), dims, **gated, **self.options)
            self.heads[node.name] = make_conv(last_width, out_channels, dims, 3)
        initialise(self, act)
        self.encoder, self.unused, self.encoder_frozen = encoder, unused, False
        self.backend = dispatch.check(backend)
        self.built: Built = {}  # of the nest
        self.refresh_handle()
        self.built = self._nests[0].built

    @property
    def last(self) -> nn.Module:
        """The last block after the deepest node."""
        return self.lasts[self.topology[0, self.topology.heads[-1]].name]

    @property
    def head(self) -> nn.Module:
        """The deepest head."""
        return self.heads[self.topology[0, self.topology.heads[-1]].name]

    def refresh_handle(self) -> None:
        """As `Network.refresh_handle`."""
        self._parts: dict[tuple[int, bool], tuple[nn.Module, EncodedNetwork]] = {}
        self._nests = (Nest(self),)  # a tuple, or it would be a part

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_nests", "_parts")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self.built = state.get("built", {})
        self.refresh_handle()

    def train(self, mode: bool = True) -> EncodedNetwork:
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        self.nest.follow(self)
        return self

    def freeze_encoder(self, frozen: bool = True) -> EncodedNetwork:
        """Keeps the encoder as it is: no gradients, and its batch norms keep their statistics in training mode too, until
        `freeze_encoder(False)`. Returns this network."""
        self.encoder_frozen = frozen
        self.encoder.requires_grad_(not frozen)
        self.encoder.train(self.training and not frozen)
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

    @property
    def multiples(self) -> tuple[int, ...]:
        """`multiple` for each axis."""
        return (self.multiple,) * self.topology.spatial_dims

    def forward(self, x: Tensor) -> Outputs:
        """Logits `[N, out_channels, *S]` for `[N, C, *S]`, with `deep_supervision` a list, X(0,1) first; or their form.

        Raises:
            TypeError, ValueError: x has the wrong type, rank or channels, or a size that is not a multiple of `multiple`.
        """
        self.check(x)
        return self.shaped(self.logits(x))

    def shaped(self, logits: Sequence[Tensor]) -> Outputs:
        """As `Network.shaped`."""
        return FORMS[self.form](logits, self.deep_supervision)

    def check(self, x: Tensor) -> None:
        """Raises one clear error if the network does not take `x`."""
        check_input(self, x, any_size=True)
        if any(size % self.multiple for size in x.shape[2:]):
            size = "x".join(map(str, x.shape[2:]))
            raise ValueError(
                f"size {size} does not fit: every axis must be a multiple of {self.multiple}; predict() pads and"
                " crops any size"
            )

    def logits(self, x: Tensor) -> list[Tensor]:
        """`[N, out_channels, *S]` of each head, X(0,1) first, for an image size that is a multiple of `multiple`."""
        return dispatch.forward(self.nest, self.maps(x))

    package_methods: ClassVar[dict[str, Callable]] = {"forward": forward, "logits": logits}

    def maps(self, x: Tensor) -> list[Tensor]:
        """The encoder's maps that the nest reads: `[N, C_k, *S / 2^k]`, k = 1, 2, ... `topology.depth` + 1; those of an
        encoder that begins at a quarter of the size without the first.

        Raises:
            ValueError: the encoder gives other maps.
        """
        widths = self.topology.first_widths
        with recomputing(x):
            maps = list(self.encoder(x))[1:]
        if not widths[0]:
            del maps[0]  # it has no channels
        if torch.compiler.is_compiling():  # a comparison would fix the sizes of a graph
            return maps
        expected = []
        for level, width in enumerate(widths):
            if width:
                expected.append((x.shape[0], width, *(side >> (level + 1) for side in x.shape[2:])))
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

    def prune(self, level: int) -> EncodedNetwork:
        """The network of the nodes with i + j <= level, the stages of the encoder that they read and the head of X(0,level);
        it shares parameters and modules, as `Network.prune`.

        Raises:
            ValueError: there is no head at `level`.

        Warns:
            UserWarning: the stages of this encoder cannot be told apart (`truncated`): it runs as a whole.
        """
        check_prunable(self)
        return self.subnetwork(self.topology.pruned(level), deep_supervision=False, form=self.form)

    def subnetwork(self, topology: Topology, deep_supervision: bool, form: str = "plain") -> EncodedNetwork:
        """A network over some of this network's nodes and heads: the same modules and attributes, nothing allocated."""
        part = sharing(self)
        part.topology, part.deep_supervision, part.form = topology, deep_supervision, form
        part.nodes = nn.ModuleDict({node.name: self.nodes[node.name] for node in topology.nodes if node.column})
        names = [topology[0, column].name for column in topology.heads]
        part.lasts = nn.ModuleDict({name: self.lasts[name] for name in names})
        part.heads = nn.ModuleDict({name: self.heads[name] for name in names})
        part.unused = None
        if topology.depth < self.topology.depth:
            part.encoder = truncated(self.encoder, topology.depth + 1, self.sample())
            if part.encoder.remark:
                warnings.warn(part.encoder.remark, stacklevel=3)
        part.refresh_handle()
        return part

    def part(self, level: int, keep_heads: bool) -> EncodedNetwork:
        """As `Network.part`; the network itself if it has no more than that."""
        topology = self.topology.pruned(level, keep_heads=keep_heads)
        if topology == self.topology:
            return self
        nest = self.nest  # which is made again, and the parts are forgotten, if a node was replaced
        encoder, part = self._parts.get((level, keep_heads), (None, None))
        if part is None or encoder is not self.encoder or not nest.is_of(self):
            part = self.subnetwork(topology, self.deep_supervision, self.form)
            self._parts[level, keep_heads] = self.encoder, part
        mine = ("_modules", "_parts", "_nests", "topology")
        part.__dict__.update((name, value) for name, value in self.__dict__.items() if name not in mine)
        return part

    def predict(
        self,
        x: Tensor,
        mode: str = "accurate",
        level: int | None = None,
        activation: str | None = None,
        flips: bool = False,
    ) -> Tensor:
        """Probabilities `[N, out_channels, *S]` for any size, as `Network.predict`."""
        return prediction.predict(self, x, mode, level, activation, flips)

    def gflop(self, size: Sequence[int]) -> float:
        """10^9 floating-point operations of one image's forward pass at `size`: PyTorch's count of the
        encoder, and that of the nest (see `Topology.gflop`)."""
        encoder = copy.deepcopy(self.encoder).to("meta").eval()
        dtype = self.head.weight.dtype
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            encoder(torch.empty(1, self.topology.in_channels, *size, device="meta", dtype=dtype))
        learned = learned_upsample(self.options["upsample"])
        nest = self.topology.over_maps(self.last_width)
        return 1e-9 * counter.get_total_flops() + nest.gflop(size, out_channels=self.out_channels, head_taps=3, **learned)

    @property
    def config(self) -> dict:
        """Plain data from which `from_config` rebuilds this network, without weights; its "encoder" is the name of timm's
        encoder, None for a module of another kind, which no data describes; "changed" as in `Network.config`."""
        why = own_forward(self) or changed(self.nest)
        return {
            **({"changed": why} if why else {}),
            **self._trained_on(),
            "encoder": self.encoder.name if isinstance(self.encoder, Encoder) else None,
            "encoder_frozen": self.encoder_frozen,
            "topology": self.topology.to_dict(),
            "last_width": self.last_width,
            "out_channels": self.out_channels,
            "deep_supervision": self.deep_supervision,
            "form": self.form,
            "attention": self.attention,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping, backend: str = "auto", encoder: nn.Module | None = None) -> EncodedNetwork:
        """The network that `config` describes, with new weights.

        encoder: for a config that names none: a module as in `UNetPlusPlus`.

        Raises:
            InputError: the config names no encoder and none is given; or timm is missing.
        """
        rest = {key: value for key, value in config.items() if key not in TRAINED_ON}
        name, frozen, topology = rest.pop("encoder"), rest.pop("encoder_frozen"), Topology.from_dict(rest.pop("topology"))
        if name is None and encoder is None:
            raise InputError(
                "this network's encoder is a module of its own, which no file describes: build the network with it, then"
                ' network.load_state_dict(torch.load(path, weights_only=True)["model"])'
            )
        module: Any = name or encoder
        given, widths = make_encoder(
            module, in_channels=topology.in_channels, spatial_dims=topology.spatial_dims, depth=topology.depth + 1
        )
        if widths != topology.first_widths:
            expected = topology.first_widths
            raise InputError(f"the encoder has maps of {widths} channels, the network was made for {expected}")
        network = cls(given, topology, **rest, backend=backend)
        network._take_over(config)
        return network.freeze_encoder() if frozen else network

    def extra_repr(self) -> str:
        heads = ", ".join(f"X(0,{column})" for column in self.topology.heads)
        return f"spatial_dims={self.topology.spatial_dims}, depth={self.topology.depth}, heads: {heads}"
