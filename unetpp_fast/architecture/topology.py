"""The nodes of a network, what each of them reads, and their widths.

The nested skip pathways of UNet++ (Zhou et al., 2018, sec. 2.1, eq. 1)::

    X(i,0) = H(pool(X(i-1,0)))                      the encoder
    X(i,j) = H([X(i,0), ..., X(i,j-1), up(X(i+1,j-1))])      j > 0

`Topology` describes this grid, its pruned forms (the nodes with i + j <= level) and U-Net, which is the same grid with
only the first column and the last diagonal. Models, converters, kernels and figures all read it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

MAX_DEPTH = 6
Position = tuple[int, int]


@dataclass(frozen=True)
class Node:
    """X(level, column): two convolutions over the prefix and the up-sampled node one level below.

    Args:
        level: the map has 1/2^level of the image's size.
        column: 0 in the encoder.
        width: its channels.
        prefix: the columns of the same level that it reads (0..column-1 for a nested node).
        up_width: the channels of the up-sampled X(level+1, column-1), 0 in the encoder.
        kernel: of its convolutions, 1 or 3 per axis; None for 3 on all.
    """

    level: int
    column: int
    width: int
    prefix: tuple[int, ...] = ()
    up_width: int = 0
    kernel: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Of its module in a network, "x0_1" for X(0,1)."""
        return f"x{self.level}_{self.column}"

    @property
    def position(self) -> Position:
        """(level, column)."""
        return self.level, self.column

    @property
    def low(self) -> Position | None:
        """The node this one up-samples, or None in the encoder."""
        return (self.level + 1, self.column - 1) if self.column else None


@dataclass(frozen=True)
class Topology:
    """A grid of nodes in an order in which they can be computed, and the columns of level 0 that have a head (Zhou et al.,
    2018, https://arxiv.org/abs/1807.10165, eq. 1).

    Args:
        in_channels, spatial_dims: of the image; 2 or 3 axes.
        nodes: in an order in which each comes after what it reads.
        heads: columns of level 0 with a head.
        given: the maps of column 0 are not computed, but given by an encoder (`over_maps`).
        strides: by how much each axis shrinks from a level to the next, 1 or 2, from level 0 down; () for 2 on all axes
            (`over_levels`).

    Raises:
        ValueError: `nested` and `plain`: a width or count is out of range.
        KeyError: `topology[i, j]`: there is no such node.
    """

    in_channels: int
    spatial_dims: int
    nodes: tuple[Node, ...]
    heads: tuple[int, ...]
    given: bool = False
    strides: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def nested(
        cls,
        in_channels: int,
        features: Sequence[int],
        *,
        spatial_dims: int = 2,
        all_heads: bool = False,
        widths: Mapping[Position, int] | None = None,
        up_width: Callable[[int, int], int] | None = None,
    ) -> Topology:
        """UNet++: every node with i + j <= depth = len(features) - 1.

        `widths` overrides the width of single nodes; `up_width(low_width, level)` gives the output channels of the
        up-sampling (default: the level's feature width).
        """
        depth = check_features(features) - 1
        grid = [(d - j, j) for d in range(depth + 1) for j in range(d + 1)]
        heads = tuple(range(1, depth + 1)) if all_heads else (depth,)
        return cls._build(in_channels, features, spatial_dims, grid, heads, widths, up_width)

    @classmethod
    def plain(
        cls,
        in_channels: int,
        features: Sequence[int],
        *,
        spatial_dims: int = 2,
        up_width: Callable[[int, int], int] | None = None,
    ) -> Topology:
        """U-Net: the encoder X(i,0) and the last diagonal, each decoder node reading X(i,0)."""
        depth = check_features(features) - 1
        grid = [(i, 0) for i in range(depth + 1)] + [(depth - j, j) for j in range(1, depth + 1)]
        return cls._build(in_channels, features, spatial_dims, grid, (depth,), None, up_width)

    @classmethod
    def _build(
        cls,
        in_channels: int,
        features: Sequence[int],
        spatial_dims: int,
        grid: Sequence[Position],
        heads: tuple[int, ...],
        widths: Mapping[Position, int] | None,
        up_width: Callable[[int, int], int] | None,
    ) -> Topology:
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, not {spatial_dims!r}")
        if not _is_count(in_channels):
            raise ValueError(f"in_channels must be a positive integer, not {in_channels!r}")
        width = {(i, j): int((widths or {}).get((i, j), features[i])) for i, j in grid}
        up_width = up_width or (lambda low_width, level: features[level])
        nodes = []
        for i, j in grid:
            prefix = tuple(column for column in range(j) if (i, column) in width)
            up = int(up_width(width[i + 1, j - 1], i)) if j else 0
            nodes.append(Node(i, j, width[i, j], prefix, up))
        return cls(int(in_channels), spatial_dims, tuple(nodes), heads)

    @property
    def depth(self) -> int:
        """The deepest level; 4 in the paper."""
        return max(node.level for node in self.nodes)

    def over_levels(
        self, strides: Sequence[Sequence[int]] | None = None, kernels: Sequence[Sequence[int]] | None = None
    ) -> Topology:
        """The same grid with other strides and kernels, as nnU-Net plans them for volumes of unlike axes.

        Args:
            strides: per axis, 1 or 2, from each level to the next one below; default 2.
            kernels: per axis, 1 or 3, of the nodes of each level; default 3.

        Raises:
            ValueError: they do not have one entry per axis for these levels, or are other numbers.
        """
        strides = _per_axis("strides", strides, self.depth, self.spatial_dims, (1, 2))
        kernels = _per_axis("kernels", kernels, self.depth + 1, self.spatial_dims, (1, 3))
        nodes = [dataclasses.replace(node, kernel=kernels[node.level]) if kernels else node for node in self.nodes]
        return dataclasses.replace(self, nodes=tuple(map(_plainly, nodes)), strides=_unless_all(strides, 2))

    @property
    def unlike_axes(self) -> bool:
        """Whether strides or kernels differ between axes."""
        return bool(self.strides) or any(node.kernel for node in self.nodes)

    def stride(self, level: int) -> tuple[int, ...]:
        """By how much each axis shrinks from the level above to this one."""
        return self.strides[level - 1] if self.strides else (2,) * self.spatial_dims

    def kernel(self, node: Node) -> tuple[int, ...]:
        """The taps of a node's convolutions along each axis."""
        return node.kernel or (3,) * self.spatial_dims

    def shrunk(self, level: int) -> tuple[int, ...]:
        """By how much each axis of a level is smaller than that of the image."""
        factors = [self.stride(below) for below in range(1, level + 1)]
        return tuple(math.prod(axis) for axis in zip(*factors, strict=True)) or (1,) * self.spatial_dims

    @property
    def multiples(self) -> tuple[int, ...]:
        """Each spatial axis must be a multiple of its number, 2^depth where every level halves it."""
        return self.shrunk(self.depth)

    @property
    def multiple(self) -> int:
        """The largest of `multiples`, of which each is a divisor."""
        return max(self.multiples)

    def __getitem__(self, position: Position) -> Node:
        for node in self.nodes:
            if node.position == tuple(position):
                return node
        raise KeyError(f"this topology has no node X{tuple(position)}")

    def low_width(self, node: Node) -> int:
        """Channels of the node that `node` up-samples; 0 in the encoder."""
        return self[node.low].width if node.low else 0

    def in_width(self, node: Node) -> int:
        """Input channels of a node's first convolution."""
        if node.column:
            return sum(self[node.level, column].width for column in node.prefix) + node.up_width
        return self[node.level - 1, 0].width if node.level else self.in_channels

    def pruned(self, level: int, keep_heads: bool = False) -> Topology:
        """Only the nodes with i + j <= level and the head of X(0,level) (the paper's L1..L4, sec. 2.2).

        `keep_heads` keeps the shallower heads too.

        Raises:
            ValueError: there is no head at `level`.
        """
        if level not in self.heads:
            have = ", ".join(str(head) for head in self.heads)
            raise ValueError(
                f"no head at level {level!r}: this network has heads at level {have}"
                + ("; UNetPlusPlus(deep_supervision=True) has one at every level" if len(self.heads) < self.depth else "")
            )
        wanted = {(0, level)}
        for node in reversed(self.nodes):
            if node.position in wanted:
                wanted |= {(node.level, column) for column in node.prefix}
                wanted |= {node.low} if node.low else {(node.level - 1, 0)} if node.level else set()
        kept = tuple(node for node in self.nodes if node.position in wanted)
        heads = tuple(head for head in self.heads if head <= level) if keep_heads else (level,)
        return dataclasses.replace(self, nodes=kept, heads=heads)

    def convolutions(self, node: Node) -> tuple[tuple[int, int], tuple[int, int]]:
        """(in, out) channels of the two 3x3 convolutions of a node."""
        return (self.in_width(node), node.width), (node.width, node.width)

    def gflop(
        self,
        size: Sequence[int],
        *,
        out_channels: int = 1,
        deconv: bool = False,
        project: bool = False,
        pixelshuffle: bool = False,
        head_taps: int = 1,
    ) -> float:
        """10^9 floating-point operations (2 per multiply-add) of one image's forward pass, all heads included.

        Convolutions, transposed ones (`deconv`), 1x1 ones before an interpolation (`project`), 3x3 ones before a
        `pixelshuffle` and heads (of `head_taps` along an axis) are counted; norms, activations and interpolation are not,
        nor is what is given.
        """
        if len(size) != self.spatial_dims:
            raise ValueError(f"size {tuple(size)} does not have {self.spatial_dims} axes")
        multiply_adds = 0
        for node in self.nodes:
            if self.given and not node.column:
                continue
            taps = math.prod(self.kernel(node))
            pixels = math.prod(axis // by for axis, by in zip(size, self.shrunk(node.level), strict=True))
            multiply_adds += pixels * sum(taps * cin * cout for cin, cout in self.convolutions(node))
            if node.column and (deconv or project or pixelshuffle):
                # A deconv has one tap per pixel here, a 1x1 convolution one per pixel below, a shuffled 3x3 all of them.
                below = math.prod(axis // by for axis, by in zip(size, self.shrunk(node.level + 1), strict=True))
                places = pixels if deconv else 3**self.spatial_dims * 2**self.spatial_dims * below if pixelshuffle else below
                multiply_adds += places * self.low_width(node) * node.up_width
        pixels = math.prod(size) * head_taps**self.spatial_dims
        multiply_adds += sum(pixels * self[0, head].width * out_channels for head in self.heads)
        return 2e-9 * multiply_adds

    def over_maps(self, last_width: int) -> Topology:
        """The nest of a network over an encoder whose maps begin at half the image's size.

        This topology one level down, with its column 0 given, and for each head at column j a last node X(0,j + 1) that
        brings X(1,j) to the image's size, reads nothing else, and has the head.
        """
        nodes = []
        for node in self.nodes:
            nodes.append(dataclasses.replace(node, level=node.level + 1))
            if node.level == 0 and node.column in self.heads:
                nodes.append(Node(0, node.column + 1, last_width, (), node.width))
        heads = tuple(column + 1 for column in self.heads)
        return Topology(self.in_channels, self.spatial_dims, tuple(nodes), heads, given=True)

    def without_finest_map(self) -> Topology:
        """The nest over an encoder whose maps begin one level down, at a quarter of the image's size.

        Of level 0 only the nodes under a head are left, and each reads nothing but the node below.
        """
        kept = (node for node in self.nodes if node.level or node.column in self.heads)
        nodes = tuple(node if node.level else dataclasses.replace(node, prefix=()) for node in kept)
        return dataclasses.replace(self, nodes=nodes)

    @property
    def first_widths(self) -> tuple[int, ...]:
        """Channels of X(i,0) for each level, 0 where there is none."""
        widths = {node.level: node.width for node in self.nodes if not node.column}
        return tuple(widths.get(level, 0) for level in range(self.depth + 1))

    def to_dict(self) -> dict:
        """Plain lists and numbers, for checkpoints; the inverse of `from_dict`."""
        nodes = [
            [n.level, n.column, n.width, list(n.prefix), n.up_width, *([list(n.kernel)] if n.kernel else [])]
            for n in self.nodes
        ]
        return {
            "in_channels": self.in_channels,
            "spatial_dims": self.spatial_dims,
            "nodes": nodes,
            "heads": list(self.heads),
            **({"strides": [list(stride) for stride in self.strides]} if self.strides else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping) -> Topology:
        """The topology of which `to_dict` returned `data`."""
        nodes = tuple(
            Node(i, j, width, tuple(prefix), up, *map(tuple, kernel)) for i, j, width, prefix, up, *kernel in data["nodes"]
        )
        strides = tuple(map(tuple, data.get("strides", ())))
        return cls(data["in_channels"], data["spatial_dims"], nodes, tuple(data["heads"]), strides=strides)


def check_features(features: Sequence[int]) -> int:
    """The number of levels, after checking that `features` holds 2 to 7 positive integers."""
    try:
        levels = len(features)
        good = all(_is_count(width) for width in features)
    except TypeError:
        levels, good = 0, False
    if not good or not 2 <= levels <= MAX_DEPTH + 1:
        raise ValueError(f"features must be 2 to {MAX_DEPTH + 1} positive integers, one width per level, not {features!r}")
    return levels


def _per_axis(
    name: str, values: Sequence[Sequence[int]] | None, count: int, axes: int, known: tuple[int, int]
) -> tuple[tuple[int, ...], ...]:
    """`values` as tuples, () for None, after checking that there are `count` of them with a known number for each axis."""
    if values is None:
        return ()
    try:
        found = tuple(map(tuple, values))
        good = len(found) == count and all(len(one) == axes and set(one) <= set(known) for one in found)
    except TypeError:
        good = False
    if not good:
        raise ValueError(
            f"{name} must be {count} tuples of {axes} numbers, each {known[0]} or {known[1]}, one per axis, not {values!r}"
        )
    return found


def _unless_all(values: tuple[tuple[int, ...], ...], usual: int) -> tuple[tuple[int, ...], ...]:
    return () if all(one == usual for value in values for one in value) else values


def _plainly(node: Node) -> Node:
    """The node without a kernel that says what is usual."""
    return dataclasses.replace(node, kernel=None) if set(node.kernel or (3,)) == {3} else node


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
