"""What the converters share: naming the same weights twice, reading shapes and layers, saying what does not fit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architecture.options import Option
from ..architecture.topology import Node, Topology
from ..models.network import Network

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Pair:
    """One tensor under our name and a peer's: ours is theirs with the axes permuted, then `order` taken along `dim`."""

    ours: str
    theirs: str
    axes: tuple[int, ...] | None = None
    order: Tensor | None = None
    dim: int = 1

    def to_ours(self, tensor: Tensor) -> Tensor:
        tensor = tensor if self.axes is None else tensor.permute(self.axes)
        tensor = tensor if self.order is None else tensor.index_select(self.dim, self.order.to(tensor.device))
        return tensor.detach().clone(memory_format=torch.contiguous_format)

    def to_theirs(self, tensor: Tensor) -> Tensor:
        if self.order is not None:
            tensor = tensor.index_select(self.dim, self.order.argsort().to(tensor.device))
        if self.axes is not None:
            tensor = tensor.permute(sorted(range(tensor.ndim), key=self.axes.__getitem__))
        return tensor.detach().clone(memory_format=torch.contiguous_format)


class Peer:
    """One implementation of UNet++: how its weights are called, in which order and layout, and what its options mean."""

    name: ClassVar[str]
    title: ClassVar[str]
    keys: ClassVar[str]  # a pattern that the names of its weights match
    open_options: ClassVar[tuple[str, ...]] = ()  # left open by its state_dict: what `convert` takes
    order: ClassVar[str] = "prefix, up"

    def claims(self, names: Iterable[str]) -> int:
        """How many of these names look like this peer's."""
        return sum(re.match(self.keys, name) is not None for name in names)

    def read(self, state: State, given: Mapping[str, Any]) -> Network:
        """The network, on the meta device, that weights of these names and shapes belong to.

        given: what the state_dict does not tell: from the user, or from `inspect`.
        """
        raise NotImplementedError

    def inspect(self, module: nn.Module) -> dict[str, Any]:
        """What a module tells beyond its state_dict.

        Raises:
            ValueError: a part of it has no counterpart; the message says which and why.
        """
        raise NotImplementedError

    def constants(self, network: Network) -> dict[str, Tensor]:
        """Tensors of ours, by our names, that the peer does not have, with the values that make them do nothing."""
        return {}

    def module(self, node: Node, part: str) -> str | None:
        """The peer's name of a node's part: "conv1", "norm2", "up", "up.project"; None where it has none."""
        raise NotImplementedError

    def head(self, column: int, topology: Topology) -> str:
        """The peer's name of the head on X(0,column)."""
        raise NotImplementedError

    def leaf(self, name: str) -> str:
        """The peer's name of a parameter or buffer of a layer."""
        return f".{name}"

    def axes(self, part: str, leaf: str, ndim: int) -> tuple[int, ...] | None:
        """How the axes of the peer's tensor are permuted into ours."""
        return None

    def pairs(self, network: Network) -> Iterator[Pair]:
        """Every tensor of a network that the peer has too."""
        nodes = {node.name: node for node in network.topology.nodes}
        for ours, tensor in network.state_dict().items():
            place, name, *part, leaf = ours.split(".")
            part, node = ".".join(part), nodes[name]
            theirs = self.module(node, part) if place == "nodes" else self.head(node.column, network.topology)
            if theirs is None:
                continue
            order = None
            if part == "conv1" and leaf == "weight" and self.order != "prefix, up":
                order = input_order(network.topology, node, self.order)
            yield Pair(ours, theirs + self.leaf(leaf), self.axes(part or "head", leaf, tensor.ndim), order)

    def fail(self, why: str) -> ValueError:
        return ValueError(f"this {self.title} cannot be converted: {why}")

    def tensor(self, state: State, name: str) -> Tensor:
        """A tensor that every state_dict of this peer has."""
        if name not in state:
            raise self.fail(f"its state_dict has no {name!r} (truncated, or of another network)")
        return state[name]


def input_order(topology: Topology, node: Node, order: str) -> Tensor | None:
    """Indices that put the input channels of a node's first convolution into our order: the prefix, then the up-sampled."""
    if not node.column:
        return None
    ends = [node.up_width]  # theirs: where each block begins
    columns = node.prefix if order == "up, prefix" else tuple(reversed(node.prefix))
    widths = {column: topology[node.level, column].width for column in node.prefix}
    for column in columns:
        ends.append(ends[-1] + widths[column])
    begins = dict(zip(columns, ends[:-1], strict=True))
    blocks = [torch.arange(begins[column], begins[column] + widths[column]) for column in node.prefix]
    return torch.cat([*blocks, torch.arange(node.up_width)])


def read_topology(
    peer: Peer, state: State, grid: Iterable[tuple[int, int]], heads: tuple[int, ...], prefixes: bool = True
) -> Topology:
    """The nodes at these places, their widths read from the shapes of their first convolutions.

    prefixes: dense skip pathways; without them a node reads X(i,0) alone.
    """
    width, inputs, nodes = {}, {}, []
    grid = list(grid)
    for i, j in grid:
        name = f"{peer.module(Node(i, j, 0), 'conv1')}{peer.leaf('weight')}"
        weight = peer.tensor(state, name)
        if weight.ndim not in (4, 5):
            raise peer.fail(f"{name} has shape {tuple(weight.shape)}, which no 2D or 3D convolution has")
        axes = peer.axes("conv1", "weight", weight.ndim)
        width[i, j], inputs[i, j] = (weight.shape if axes is None else weight.permute(axes).shape)[:2]
    for i, j in grid:
        prefix = () if not j else tuple(range(j)) if prefixes else (0,)
        up = inputs[i, j] - sum(width[i, column] for column in prefix) if j else 0
        if j and up < 1:
            raise peer.fail(f"X({i},{j}) reads {inputs[i, j]} channels, fewer than its skip connections have")
        nodes.append(Node(i, j, width[i, j], prefix, up))
    return Topology(inputs[0, 0], weight.ndim - 2, tuple(nodes), heads)


def check_widths(
    peer: Peer, topology: Topology, up: Callable[[int, int, int], int], free: Iterable[tuple[int, int]] = ()
) -> None:
    """Whether the peer's class can build this: levels of one width each (the nodes `free` apart), and up-samplings that
    hand over `up(width of the node below, width of the level, level)` channels.

    Raises:
        ValueError: it cannot.
    """
    for node in topology.nodes:
        level = topology[node.level, 0].width
        expected = up(topology.low_width(node), level, node.level) if node.column else 0
        if node.width != level and node.position not in free:
            raise peer.fail(f"X{node.position} is {node.width} channels wide, and X({node.level},0) is {level}")
        if node.up_width != expected:
            raise peer.fail(f"X{node.position} reads {node.up_width} channels from the node below, expected {expected}")


def nest(depth: int) -> list[tuple[int, int]]:
    """(level, column) of every node of a UNet++, in an order in which they can run."""
    return [(d - j, j) for d in range(depth + 1) for j in range(d + 1)]


def build(topology: Topology, out_channels: int, **options: Any) -> Network:
    """A network without storage: its weights are put in place afterwards, and no random number is drawn."""
    with torch.device("meta"):
        return Network(topology, out_channels, **options)


def fill(peer: Peer, network: nn.Module, pairs: Iterable[Pair], state: State, constants: State) -> None:
    """Gives a network made by `build` copies of the weights of `state`, and `constants` under our names, frozen.

    Raises:
        ValueError: names or shapes do not fit; one message lists what.
    """
    pairs, own = list(pairs), network.state_dict()
    known = {pair.theirs: pair for pair in pairs}
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(pair.to_theirs(own[pair.ours]).shape)}"
        for name, pair in known.items()
        if name in state and state[name].shape != pair.to_theirs(own[pair.ours]).shape
    ]
    problems = [
        *_listed("it has no", [name for name in known if name not in state]),
        *_listed("nothing is known of", [name for name in state if name not in known]),
        *_listed("", wrong),
    ]
    if problems:
        raise peer.fail("; ".join(problems))
    mine = {pair.ours: pair.to_ours(state[pair.theirs]) for pair in pairs}
    like = next(iter(mine.values()))  # a convolution's weight
    network.load_state_dict({**mine, **{name: value.to(like) for name, value in constants.items()}}, assign=True)
    for name in constants:
        network.get_parameter(name).requires_grad_(False)


def _listed(what: str, names: list[str]) -> list[str]:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{more}".strip()] if names else []


def same(peer: Peer, values: Iterable[Any], what: str) -> Any:
    """The one value that all layers share."""
    values = list(values)
    if any(value != values[0] for value in values[1:]):
        raise peer.fail(f"its layers differ in {what}: {values[0]!r} and {next(v for v in values if v != values[0])!r}")
    return values[0]


def norm_option(peer: Peer, norm: nn.Module) -> Option | None:
    """Our option for a norm layer."""
    if isinstance(norm, nn.Identity):
        return None
    if type(norm) in (nn.BatchNorm2d, nn.BatchNorm3d):
        if not norm.affine or not norm.track_running_stats:
            raise peer.fail("its batch norm lacks scale and shift or running statistics")
        return "batch", {"eps": norm.eps, "momentum": norm.momentum}
    if type(norm) in (nn.InstanceNorm2d, nn.InstanceNorm3d):
        if norm.track_running_stats:
            raise peer.fail("its instance norm uses running statistics")
        return "instance", {"eps": norm.eps, "affine": norm.weight is not None}
    raise peer.fail(f"its norm is {type(norm).__name__}; unetpp_fast has batch norm and instance norm")


def act_option(peer: Peer, act: nn.Module) -> Option:
    """Our option for an activation layer."""
    if type(act) is nn.ReLU:
        return "relu"
    if type(act) is nn.LeakyReLU:
        return "leaky_relu", {"negative_slope": act.negative_slope}
    raise peer.fail(f"its activation is {type(act).__name__}; unetpp_fast has ReLU and LeakyReLU")


def norm_of_names(peer: Peer, state: State, name: str, given: Mapping[str, Any]) -> Option | None:
    """The norm that a state_dict shows under `name`, with the keywords of `given["norm"]`, which must agree with it."""
    kind = "batch" if f"{name}.running_mean" in state else "instance" if f"{name}.weight" in state else None
    if "norm" not in given:
        if kind is None:
            raise peer.fail("its state_dict has no norm with weights: say norm=None or norm=('instance', {'affine': False})")
        return kind
    norm = given["norm"]
    named = norm if norm is None or isinstance(norm, str) else norm[0]
    if named != kind and (kind or named not in (None, "instance")):
        raise peer.fail(f"norm={norm!r} was given, but the names of its weights show {kind or 'none with weights'}")
    return norm
