"""UNet++, its pruned forms and U-Net as one `nn.Module` over any topology."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.layers import NodeModule, initialise, make_conv
from ..architecture.options import DOWNSAMPLES, Option, learned_upsample
from ..architecture.output_forms import FORMS, Outputs, check_form
from ..architecture.topology import Topology
from ..execution import dispatch
from ..execution.built import built, changed
from ..execution.fused.structure import structure_of
from . import prediction
from .own_forward import check_prunable, own_forward, sharing
from .pretrained import TRAINED_ON, Pretrained


class Network(Pretrained, nn.Module):
    """A network over any `Topology`: what `UNetPlusPlus`, `UNet`, `prune` and `convert` build.

    Input `[N, in_channels, *S]`, floating point, every axis of S a multiple of 2^depth. Output: logits
    `[N, out_channels, *S]`, or a list with one per head, with `deep_supervision`.

    Args:
        topology: the nodes and the heads.
        out_channels, norm, act, upsample, dropout, deep_supervision, backend: as in `UNetPlusPlus`.
        bias, head_bias: whether the 3x3 convolutions, and the heads, have a bias.
        downsample: "pool" (2x2 maxima) or "stride" (the first convolution of a level halves the map).
        odd_sizes: also accept sizes that are not a multiple of 2^depth: pooling drops the last pixel of an odd axis, an
            up-sampled map repeats its last one. The engine then up-samples low sources into maps (`fused/upsampling.py`).
        form: how `forward` returns the logits, a name in `unetpp_fast.architecture.output_forms`.
        spare_heads: columns of level 0 whose heads are kept, frozen, and never run.

    Raises:
        ValueError: an option is unknown or out of range; the message says what is allowed.
    """

    over_encoder = False  # whether another library's layers compute a part of it
    sync_group = ""  # the process group over which batch norms take statistics; set by `sync_batch_norm`
    recompute = False  # backward passes recompute the inside of nodes instead of keeping it: less memory, more time

    def __init__(
        self,
        topology: Topology,
        out_channels: int = 1,
        *,
        norm: Option | None = "batch",
        act: Option = "relu",
        upsample: Option = "deconv",
        dropout: float = 0.0,
        bias: bool = True,
        deep_supervision: bool = False,
        backend: str = "auto",
        downsample: str = "pool",
        head_bias: bool = True,
        odd_sizes: bool = False,
        form: str = "plain",
        spare_heads: Sequence[int] = (),
    ):
        super().__init__()
        if not isinstance(out_channels, int) or isinstance(out_channels, bool) or out_channels < 1:
            raise ValueError(f"out_channels must be a positive integer, not {out_channels!r}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), not {dropout!r}")
        self.topology = topology
        self.out_channels = out_channels
        self.deep_supervision = deep_supervision
        if downsample not in DOWNSAMPLES:
            raise ValueError(f"downsample must be one of {DOWNSAMPLES}, not {downsample!r}")
        self.form = check_form(form)
        shared: dict[str, Any] = {
            "norm": norm,
            "act": act,
            "upsample": upsample,
            "dropout": dropout,
            "bias": bias,
            "odd_sizes": odd_sizes,
        }
        self.options: dict[str, Any] = {**shared, "downsample": downsample, "head_bias": head_bias}
        self.backend = dispatch.check(backend)
        dims = topology.spatial_dims
        self.nodes = nn.ModuleDict()
        for node in topology.nodes:
            up = (topology.low_width(node), node.up_width) if node.column else None
            shape: dict[str, Any] = {"kernel": topology.kernel(node)} if node.kernel else {}
            if node.column and topology.strides:
                shape["factors"] = topology.stride(node.level + 1)
            elif downsample == "stride" and node.level and not node.column:
                shape["stride"] = topology.stride(node.level)
            self.nodes[node.name] = NodeModule(topology.convolutions(node), up, dims, **shape, **shared)
        self.heads = nn.ModuleDict()
        for column in sorted({*topology.heads, *spare_heads}):
            head = topology[0, column]
            self.heads[head.name] = make_conv(head.width, out_channels, dims, 1, head_bias)
        for column in spare_heads:
            self.heads[topology[0, column].name].requires_grad_(False)
        initialise(self, act)
        self.built = built(self)
        self.refresh_handle()

    def refresh_handle(self) -> None:
        """Registers the network, as it was built, with the fused operators: after building and unpickling."""
        self._parts: dict[tuple[int, bool], Network] = {}
        self.structure = structure_of(self)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_parts", "structure")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "built" not in state:  # of an older version
            self.built = built(self)
        self.refresh_handle()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Network:
        super()._apply(fn, recurse)  # what .to(), .cuda() and .half() go through
        dispatch.prepare(self)
        return self

    def forward(self, x: Tensor) -> Outputs:
        """Logits `[N, out_channels, *S]`; with `deep_supervision` a list, X(0,1) first; after `convert` what the original
        returns (`unetpp_fast.architecture.output_forms`).

        Raises:
            TypeError: x is not a floating-point tensor.
            ValueError: x has the wrong rank, channel count or size; the message says what is expected.
        """
        check_input(self, x, any_size=self.options["odd_sizes"])
        return self.shaped(self.logits(x))

    def logits(self, x: Tensor) -> list[Tensor]:
        """Logits `[N, out_channels, *S]` of each head, X(0,1) first, for an `x` that `check_input` accepts."""
        return dispatch.forward(self, x)

    package_methods: ClassVar[dict[str, Callable]] = {"forward": forward, "logits": logits}  # a subclass may have others

    def engine_input(self, x: Tensor) -> tuple[Network, Tensor]:
        """This network and `x`, which is checked."""
        check_input(self, x, any_size=self.options["odd_sizes"])
        return self, x

    def shaped(self, logits: Sequence[Tensor]) -> Outputs:
        """What `forward` returns for these logits of each head, X(0,1) first."""
        return FORMS[self.form](logits, self.deep_supervision)

    def prune(self, level: int) -> Network:
        """The network of the nodes with i + j <= level and the head of X(0,level); it shares parameters and modules.

        It keeps what was done to this one: changed layers, hooks, the `forward` of a subclass. Moving or training the pruned
        model moves or trains these nodes of this model too;
        `copy.deepcopy(model.prune(2))` is independent.

        Raises:
            ValueError: there is no head at `level`, or `forward` was replaced on this instance.
        """
        check_prunable(self)
        return self.subnetwork(self.topology.pruned(level), deep_supervision=False, form=self.form)

    def subnetwork(self, topology: Topology, deep_supervision: bool, form: str = "plain") -> Network:
        """A network over some of this network's nodes and heads: the same modules and attributes, nothing allocated."""
        part = sharing(self)
        part.topology, part.deep_supervision, part.form = topology, deep_supervision, form
        part.nodes = nn.ModuleDict({node.name: self.nodes[node.name] for node in topology.nodes})
        part.heads = nn.ModuleDict(
            {topology[0, column].name: self.heads[topology[0, column].name] for column in topology.heads}
        )
        kept = {"nodes", "heads", *(f"nodes.{name}" for name in part.nodes), *(f"heads.{name}" for name in part.heads)}
        part.built = {name: facts for name, facts in self.built.items() if ".".join(name.split(".")[:2]) in kept}
        part.refresh_handle()
        return part

    def part(self, level: int, keep_heads: bool) -> Network:
        """The nodes with i + j <= level and the heads up to `level`, or only that head, as a network on the same modules.

        Built once, and again only after a node or head was replaced.
        """
        part = self._parts.get((level, keep_heads))
        if part is None or not part._is_of(self):
            topology = self.topology.pruned(level, keep_heads=keep_heads)
            part = self._parts[level, keep_heads] = self.subnetwork(topology, self.deep_supervision, self.form)
        mine = ("_modules", "_parts", "structure", "built", "topology")
        part.__dict__.update((name, value) for name, value in self.__dict__.items() if name not in mine)
        return part

    def _is_of(self, whole: Network) -> bool:
        """Whether this network's nodes and heads are still modules of `whole`."""
        mine, theirs = (self.nodes, self.heads), (whole.nodes, whole.heads)
        return all(theirs[k][name] is module for k, modules in enumerate(mine) for name, module in modules.items())

    def predict(
        self,
        x: Tensor,
        mode: str = "accurate",
        level: int | None = None,
        activation: str | None = None,
        flips: bool = False,
    ) -> Tensor:
        """Probabilities `[N, out_channels, *S]` for any size: padded and cropped inside, in eval mode, without gradients.

        Args:
            x: `[N, in_channels, *S]`, floating point, finite; or whole numbers, which are prepared as in training
                (`normalisation`). From half precision the probabilities are float32.
            mode: "accurate": the mean over the heads up to `level`; "fast": only the head at `level`,
                and only the nodes it needs (sec. 3 of the paper).
            level: default the deepest head.
            activation: "sigmoid" (classes overlap) or "softmax" (classes exclude one another); default as the network was
                trained (`exclusive`).
            flips: whether to take the mean over the mirror images too (test-time augmentation): 4 passes, of a volume 8.

        Raises:
            TypeError, ValueError: x has the wrong type, rank or channels, or contains NaN; an argument is unknown.
        """
        return prediction.predict(self, x, mode, level, activation, flips)

    def gflop(self, size: Sequence[int]) -> float:
        """10^9 floating-point operations of one image's forward pass at `size` (see `Topology.gflop`)."""
        learned = learned_upsample(self.options["upsample"])
        return self.topology.gflop(size, out_channels=self.out_channels, **learned)

    @property
    def multiple(self) -> int:
        """Every spatial axis of the image may be a multiple of this."""
        return self.topology.multiple

    @property
    def multiples(self) -> tuple[int, ...]:
        """Each spatial axis of the image must be a multiple of its number."""
        return self.topology.multiples

    @property
    def spare_heads(self) -> list[int]:
        """Columns of level 0 whose head is kept and never run."""
        nodes = self.topology.nodes
        return [node.column for node in nodes if node.name in self.heads and node.column not in self.topology.heads]

    @property
    def config(self) -> dict:
        """Plain data from which `from_config` rebuilds this network, without weights; "changed" says why it cannot, if the
        network was changed after it was built."""
        why = own_forward(self) or changed(self)
        return {
            **({"changed": why} if why else {}),
            **self._trained_on(),
            "topology": self.topology.to_dict(),
            "out_channels": self.out_channels,
            "deep_supervision": self.deep_supervision,
            "form": self.form,
            "spare_heads": self.spare_heads,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping, backend: str = "auto") -> Network:
        """The network that `config` describes, with new weights.

        Raises:
            ValueError: `config` is of a network that was changed after it was built.
        """
        if config.get("changed"):
            raise ValueError(
                f"the network was changed after it was built, and its settings do not describe it ({config['changed']}):"
                " make it as you did and load its state_dict"
            )
        rest = {key: value for key, value in config.items() if key not in ("topology", *TRAINED_ON)}
        network = Network(Topology.from_dict(config["topology"]), **rest, backend=backend)
        network._take_over(config)
        return network

    def extra_repr(self) -> str:
        heads = ", ".join(f"X(0,{column})" for column in self.topology.heads)
        return f"spatial_dims={self.topology.spatial_dims}, depth={self.topology.depth}, heads: {heads}"
