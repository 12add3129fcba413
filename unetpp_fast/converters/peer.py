"""`Peer`, the base class of all converters, and the functions they share.

A converter maps the names of weights, reads widths from shapes and options from layers, and refuses what has no
counterpart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..architecture.options import ACTIVATIONS, NORMS, Option, norm_name
from ..architecture.topology import Node, Topology
from ..models.network import Network

State = Mapping[str, Tensor]
# The PyTorch layers of our norms; the keywords in `NORMS` are attributes of the same names.
NORM_LAYERS = {
    "batch": (nn.BatchNorm2d, nn.BatchNorm3d),
    "instance": (nn.InstanceNorm2d, nn.InstanceNorm3d),
    "group": (nn.GroupNorm,),
}


SWISHES = ("Swish", "MemoryEfficientSwish")  # MONAI's


@dataclass(frozen=True)
class Pair:
    """A tensor under our name and the peer's: ours is theirs with permuted axes, then reordered by `order` along `dim`."""

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
    """An implementation of UNet++: the names, order and layout of its weights, and its options in our terms.

    A subclass sets the attributes without a default and overrides `read`, `inspect`, `module` and `head`; the rest only
    where it differs.

    Attributes:
        name: for `to_state_dict`.
        title: for error messages.
        keys: a pattern that the names of its weights match.
        open_options: what its state_dict leaves open: the options that `convert` takes with it.
        order: of the input channels of a node's first convolution: "prefix, up", "up, prefix" or "up, descending" (the
            prefix from X(i,j-1) to X(i,0)).
        model: class of the converted model.
        needs_module: why a state_dict is not enough to convert; "" if it is.
        file_kind: the kind of file that `read_file` reads, with its article.
        file_endings: of such files.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    keys: ClassVar[str]
    open_options: ClassVar[tuple[str, ...]] = ()
    order: ClassVar[str] = "prefix, up"
    model: ClassVar[type[nn.Module]] = Network
    needs_module: ClassVar[str] = ""
    file_kind: ClassVar[str] = ""
    file_endings: ClassVar[tuple[str, ...]] = ()

    def claims(self, names: Iterable[str]) -> int:
        """How many of these names look like this peer's."""
        return sum(re.match(self.keys, name) is not None for name in names)

    def read(self, state: State, given: Mapping[str, Any]) -> Network:
        """The network, on the meta device, that weights with these names and shapes belong to.

        given: the options that the state_dict leaves open, from the user or from `inspect`.
        """
        raise NotImplementedError

    def read_file(self, path: Path) -> State:
        """The weights in a file with one of the `file_endings`."""
        raise NotImplementedError

    def plain_names(self, state: State) -> State:
        """The weights with other spellings of the peer's names replaced by the one that `keys` matches."""
        return state

    def convert(self, module: nn.Module) -> nn.Module:
        """The converted model of a module."""
        return self.from_state(module.state_dict(), self.inspect(module))

    def from_state(self, state: State, given: Mapping[str, Any]) -> nn.Module:
        """The converted model of a state_dict; arguments as in `read`."""
        network = self.read(state, given)
        fill(self, network, self.pairs(network), state, self.constants(network))
        return network.to(next(iter(network.parameters())).device)  # loads this GPU's tuning results

    def written(self, state: dict[str, Tensor]) -> dict[str, Any]:
        """The weights in the type that the peer takes."""
        return state

    def inspect(self, module: nn.Module) -> dict[str, Any]:
        """The options of a module that its state_dict does not show.

        Raises:
            ValueError: a part of it has no counterpart; the message says which and why.
        """
        raise NotImplementedError

    def constants(self, network: Network) -> dict[str, Tensor]:
        """Our tensors, by our names, that the peer does not have, with the values that make them the identity."""
        return {}

    def module(self, node: Node, part: str) -> str | None:
        """The peer's name of a part of a node ("conv1", "norm2", "up", "up.project"); None if it has no such part."""
        raise NotImplementedError

    def head(self, column: int, topology: Topology) -> str:
        """The peer's name of the head on X(0,column)."""
        raise NotImplementedError

    def leaf(self, name: str) -> str:
        """The peer's name of a parameter or buffer of a layer."""
        return f".{name}"

    def axes(self, part: str, leaf: str, ndim: int) -> tuple[int, ...] | None:
        """The permutation that turns the axes of the peer's tensor into ours; None if they are the same."""
        return None

    def pairs(self, network: Any) -> Iterator[Pair]:
        """Every tensor of a network that the peer has too."""
        nodes = {node.name: node for node in network.topology.nodes}
        for ours, tensor in network.state_dict().items():
            place, name, *inner, leaf = ours.split(".")
            part, node = ".".join(inner), nodes[name]
            theirs = self.module(node, part) if place == "nodes" else self.head(node.column, network.topology)
            if theirs is None:
                continue
            order = None
            if part == "conv1" and leaf == "weight" and self.order != "prefix, up":
                order = input_order(network.topology, node, self.order)
            yield Pair(ours, theirs + self.leaf(leaf), self.axes(part or "head", leaf, tensor.ndim), order)

    def fail(self, why: str) -> ValueError:
        """The error to raise if something has no counterpart."""
        return ValueError(f"this {self.title} cannot be converted: {why}")

    def tensor(self, state: State, name: str) -> Tensor:
        """A tensor that every state_dict of this peer has; ValueError if this one does not."""
        if name not in state:
            raise self.fail(f"its state_dict has no {name!r} (truncated, or from another network)")
        return state[name]


def input_order(topology: Topology, node: Node, order: str) -> Tensor | None:
    """Indices that put the input channels of a node's first convolution into our order: "prefix, up".

    order: the peer's, as in `Peer.order`. Returns None if the node has no prefix.
    """
    if not node.column:
        return None
    ends = [node.up_width]  # of the peer's blocks
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
    """A topology with widths read from the shapes of the first convolutions.

    Args:
        peer: names the convolutions.
        state: the weights.
        grid: (level, column) of each node.
        heads: columns with a head.
        prefixes: whether nodes read X(i,0..j-1); if not, only X(i,0).
    """
    width, inputs, nodes = {}, {}, []
    grid = list(grid)
    for i, j in grid:
        name = f"{peer.module(Node(i, j, 0), 'conv1')}{peer.leaf('weight')}"
        weight = peer.tensor(state, name)
        if weight.ndim not in (4, 5):
            raise peer.fail(f"{name} has shape {tuple(weight.shape)}, which is not that of a 2D or 3D convolution")
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
    """Checks that the peer's class can build this topology.

    All nodes of a level have the same width, except those in `free`, and up-samplings have
    `up(width of the node below, width of the level, level)` output channels.

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
    """(level, column) of every node of a UNet++, in an order in which they can be computed."""
    return [(d - j, j) for d in range(depth + 1) for j in range(d + 1)]


def build(topology: Topology, out_channels: int, **options: Any) -> Network:
    """A network on the meta device: its weights are assigned later, and no random numbers are drawn."""
    with torch.device("meta"):
        return Network(topology, out_channels, **options)


def fill(peer: Peer, network: nn.Module, pairs: Iterable[Pair], state: State, constants: State) -> None:
    """Assigns copies of the weights in `state` to a network made by `build`, and `constants` (by our names), frozen.

    Raises:
        ValueError: names or shapes do not fit; the message lists them.
    """
    pairs, own = list(pairs), network.state_dict()
    known = {pair.theirs: pair for pair in pairs}
    wrong = [
        f"{name} has shape {tuple(state[name].shape)}, expected {tuple(pair.to_theirs(own[pair.ours]).shape)}"
        for name, pair in known.items()
        if name in state and state[name].shape != pair.to_theirs(own[pair.ours]).shape
    ]
    problems = [
        *_summary("it has no", [name for name in known if name not in state]),
        *_summary("nothing is known of", [name for name in state if name not in known]),
        *_summary("", wrong),
    ]
    if problems:
        raise peer.fail("; ".join(problems))
    mine = {pair.ours: pair.to_ours(state[pair.theirs]) for pair in pairs}
    like = next(iter(mine.values()))  # a convolution's weight
    network.load_state_dict({**mine, **{name: value.to(like) for name, value in constants.items()}}, assign=True)
    for name in constants:
        network.get_parameter(name).requires_grad_(False)


def _summary(what: str, names: list[str]) -> list[str]:
    """One problem with the first three names it concerns; empty if there are none."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return [f"{what} {', '.join(names[:3])}{more}".strip()] if names else []


def same(peer: Peer, values: Iterable[Any], what: str) -> Any:
    """The value that all layers share; ValueError if they differ."""
    values = list(values)
    if any(value != values[0] for value in values[1:]):
        raise peer.fail(f"its layers differ in {what}: {values[0]!r} and {next(v for v in values if v != values[0])!r}")
    return values[0]


def norm_option(peer: Peer, norm: nn.Module) -> Option | None:
    """Our option for a norm layer; ValueError if we have none."""
    if isinstance(norm, nn.Identity):
        return None
    name = next((name for name, layers in NORM_LAYERS.items() if type(norm) in layers), None)
    if name is None:
        raise peer.fail(f"its norm is {type(norm).__name__}; unetpp_fast has {_listed([f'{name} norm' for name in NORMS])}")
    if NORMS[name].per_image and getattr(norm, "track_running_stats", False):
        raise peer.fail(f"its {name} norm uses running statistics")
    if not NORMS[name].per_image and not (norm.affine and norm.track_running_stats):
        raise peer.fail(f"its {name} norm lacks scale and shift or running statistics")
    return name, {keyword: getattr(norm, keyword) for keyword in NORMS[name].keywords}


def act_option(peer: Peer, act: nn.Module) -> Option:
    """Our option for an activation layer; ValueError if we have none."""
    for name, entry in ACTIVATIONS.items():
        if type(act) is entry.layer:
            keywords = {keyword: getattr(act, keyword) for keyword in entry.keywords}
            return (name, keywords) if keywords else name
    if type(act).__name__ in SWISHES and getattr(act, "alpha", 1.0) == 1.0:
        return "silu"
    layers = _listed([entry.layer.__name__ for entry in ACTIVATIONS.values()])
    raise peer.fail(f"its activation is {type(act).__name__}; unetpp_fast has {layers}")


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def norm_of_names(peer: Peer, state: State, name: str, given: Mapping[str, Any]) -> Option | None:
    """The norm whose weights a state_dict has under `name`, or `given["norm"]`, which must agree with them."""
    kind = "batch" if f"{name}.running_mean" in state else "instance" if f"{name}.weight" in state else None
    if "norm" not in given:
        if kind is None:
            raise peer.fail("its state_dict has no norm with weights: say norm=None or norm=('instance', {'affine': False})")
        return kind
    norm = given["norm"]
    named = norm_name(norm)
    shown = "instance" if named == "group" else named  # which has weights of the same names
    if shown != kind and (kind or shown not in (None, "instance")):
        raise peer.fail(f"norm={norm!r} was given, but the names of its weights show {kind or 'none with weights'}")
    return norm
