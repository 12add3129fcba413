"""Inference on a CPU: every node's map has a place of its own that is kept between calls, and nothing is concatenated.

PyTorch hands oneDNN only dense tensors, so here a level's buffer holds its nodes one behind the other instead of side
by side, and a node's first convolution is a sum over its prefix, accumulated in place. Its low source is read at its own
resolution by a transposed 4x4 convolution with composed weights (`compose.py`), all phases at once. Both run over strips
of rows that stay in the cache from the first accumulation to the second convolution. Images larger than a strip run
one after the other, smaller ones a few at once; memory does not grow with the batch.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..plan.steps import Plan, Step
from . import convolutions
from .packed_weights import Weights

STRIP_BYTES = 2**21  # of a strip of a node's map, for each thread
SUMMED_PIXELS = 2048  # in one sum of float32: statistics of more pixels lose digits
KEPT_WORKSPACES, KEPT_BYTES = 4, 2**30  # idle ones of this process, and their memory; the latest may be larger


class Workspace:
    """The maps of `count` images in a pass of `plan`, for one call at a time.

    Nodes that others read have a map each; what a single node reads, and its first convolution's output, share memory
    with those of other nodes. A map cut into strips is of one image, `[1, C, S0 + 2, ...]`, with a row of zeros (`edge`)
    before and behind the first axis of S; small ones are whole, `[count, C, *S]`.
    """

    def __init__(self, plan: Plan, count: int, size: Sequence[int], dtype: torch.dtype):
        self.plan, self.count, self.dtype, self.threads = plan, count, dtype, torch.get_num_threads()
        self.edge = 0 if fitting(plan, size, dtype) else 1
        self.sizes = [tuple(axis >> level for axis in size) for level in range(plan.topology.depth + 1)]
        self.image = self._map(0, plan.topology.in_channels)
        read = {(step.node.level, column) for step in plan.steps for column in step.node.prefix}
        read |= {step.node.low for step in plan.steps if step.node.low}
        read |= {(step.node.level - 1, 0) for step in plan.steps if step.source == "pool"}
        whole = plan.norm == "instance"  # statistics need all of a map
        kept = [step for step in plan.steps if whole or step.node.position in read]
        self.nodes = {step.node.name: self._map(step.node.level, step.node.width) for step in kept}
        counts = [self._count(step.node.level, step.node.width) for step in plan.steps]
        self._middle = torch.zeros(max(counts), dtype=dtype)
        counts = [self._count(step.node.level, self._beside_width(step)) for step in plan.steps]
        self._beside = torch.zeros(max(counts), dtype=dtype)
        last = [step for step in plan.steps if step.node.name not in self.nodes]
        counts = [self._count(step.node.level, step.node.width, self.rows(step) + self.edge) for step in last]
        self._strip = torch.zeros(max(counts, default=0), dtype=dtype)

    @property
    def nbytes(self) -> int:
        memory = (self.image, self._middle, self._beside, self._strip, *self.nodes.values())
        return sum(tensor.untyped_storage().nbytes() for tensor in memory)

    def _beside_width(self, step: Step) -> int:
        """Channels of what is made for a node and read by it alone: the pooled or the up-sampled map."""
        if step.source == "pool":
            return self.plan.topology[step.node.level - 1, 0].width
        return step.node.up_width if step.form == "full" else 0

    def _count(self, level: int, width: int, rows: int | None = None) -> int:
        rows = self.sizes[level][0] + 2 * self.edge if rows is None else rows
        return self.count * width * rows * math.prod(self.sizes[level][1:])

    def _map(self, level: int, width: int) -> Tensor:
        return self._shaped(torch.zeros(self._count(level, width), dtype=self.dtype), level, width)

    def _shaped(self, memory: Tensor, level: int, width: int, rows: int | None = None) -> Tensor:
        """The start of `memory` as a map of a level, or as `rows` rows of one."""
        rows = self.sizes[level][0] + 2 * self.edge if rows is None else rows
        size = (self.count, rows, *self.sizes[level][1:], width)
        return memory[: math.prod(size)].view(size).movedim(-1, 1)

    def _bordered(self, memory: Tensor, level: int, width: int) -> Tensor:
        """As `_shaped`, with the rows before and behind zeroed: other nodes have used this memory."""
        found = self._shaped(memory, level, width)
        if self.edge:
            found[:, :, 0].zero_()
            found[:, :, -1].zero_()
        return found

    def middle(self, step: Step) -> Tensor:
        """For the output of a node's first convolution."""
        return self._bordered(self._middle, step.node.level, step.node.width)

    def beside(self, step: Step) -> Tensor:
        """For the pooled or up-sampled map that a node reads."""
        return self._bordered(self._beside, step.node.level, self._beside_width(step))

    def out(self, step: Step, first: int, last: int) -> Tensor:
        """For rows of a node's output; of a node that only a head reads, in memory that the next strip uses again."""
        node = step.node
        if node.name in self.nodes:
            return self.inner(self.nodes[node.name], first, last)
        return self._shaped(self._strip, node.level, node.width, last - first)

    def rows(self, step: Step) -> int:
        """Rows of a strip: even, so that it lies over whole rows of the level below."""
        if not self.edge:
            return self.sizes[step.node.level][0]
        row = self._count(step.node.level, step.node.width, 1) * self.dtype.itemsize
        return max(2, STRIP_BYTES * self.threads // row // 2 * 2)

    def strips(self, step: Step) -> list[tuple[int, int]]:
        """(first, last) rows of each strip of a node's map."""
        total, rows = self.sizes[step.node.level][0], self.rows(step)
        return [(first, min(first + rows, total)) for first in range(0, total, rows)]

    def inner(self, x: Tensor, first: int = 0, last: int | None = None) -> Tensor:
        """Rows [first, last) of a map, by default all but its edges."""
        last = x.shape[2] - 2 * self.edge if last is None else last
        return x[:, :, first + self.edge : last + self.edge]

    def around(self, x: Tensor, first: int, last: int) -> Tensor:
        """Rows [first, last) of a map, of one with edges those before and behind too."""
        return x[:, :, first : last + 2 * self.edge]


def fitting(plan: Plan, size: Sequence[int], dtype: torch.dtype) -> int:
    """How many images of a size are no larger than a strip together; 0 where a single one is cut into strips."""
    width = max(step.out.width for step in plan.steps if step.node.level == 0)
    return STRIP_BYTES * torch.get_num_threads() // (width * math.prod(size) * dtype.itemsize)


class Workspaces:
    """Idle workspaces of this process, the latest used ones kept; a call takes one for itself and gives it back."""

    def __init__(self):
        self._idle: list[Workspace] = []
        self._lock = threading.Lock()

    def take(self, plan: Plan, count: int, size: Sequence[int], dtype: torch.dtype) -> Workspace:
        wanted = (count, tuple(size), dtype, torch.get_num_threads())
        with self._lock:
            for place in reversed(range(len(self._idle))):
                idle = self._idle[place]
                if idle.plan is plan and (idle.count, idle.sizes[0], idle.dtype, idle.threads) == wanted:
                    return self._idle.pop(place)
            self._drop(0)
        with torch.inference_mode(False):  # so that any later call may write to it
            return Workspace(plan, count, size, dtype)

    def give(self, workspace: Workspace) -> None:
        with self._lock:
            self._idle.append(workspace)
            self._drop(1)

    def _drop(self, least: int) -> None:
        """The oldest ones, until what is kept is within its bounds or only `least` are left."""
        while len(self._idle) > least and (
            len(self._idle) > KEPT_WORKSPACES or sum(each.nbytes for each in self._idle) > KEPT_BYTES
        ):
            del self._idle[0]

    def clear(self) -> None:
        """Gives the memory of all idle workspaces back."""
        with self._lock:
            self._idle.clear()


workspaces = Workspaces()


@torch.no_grad()
def run(plan: Plan, weights: Weights, x: Tensor, columns: Sequence[int] | None = None) -> list[Tensor]:
    """Logits `[N, classes, *S]`, in the weights' precision, of the heads at `columns` (default all), for `[N, C, *S]`."""
    columns = plan.topology.heads if columns is None else columns
    classes = {column: weights.heads[column][0].shape[0] for column in columns}
    logits = {column: x.new_empty((x.shape[0], classes[column], *x.shape[2:]), dtype=weights.dtype) for column in columns}
    images = x.split(max(1, fitting(plan, x.shape[2:], weights.dtype)))
    parts = zip(*(each.flatten(2).split(max(1, len(images[0]))) for each in logits.values()), strict=True)
    with torch.autocast("cpu", enabled=False):
        for some, part in zip(images, parts, strict=True):
            if len(some):
                workspace = workspaces.take(plan, len(some), x.shape[2:], weights.dtype)
                workspace.inner(workspace.image).copy_(some)
                one = Pass(plan, weights, workspace, dict(zip(columns, part, strict=True)))
                for step in plan.steps:
                    one.node(step)
                workspaces.give(workspace)
    return list(logits.values())


class Pass:
    """A few images through a plan; `logits` are `[N, classes, pixels]` by column."""

    def __init__(self, plan: Plan, weights: Weights, workspace: Workspace, logits: dict[int, Tensor]):
        self.plan, self.weights, self.workspace, self.logits = plan, weights, workspace, logits
        self.fused_relu = plan.slope == 0 and plan.norm != "instance"

    def node(self, step: Step) -> None:
        """X(i,j): the second convolution of a strip follows the first one's while it is in the cache; it lags by the row
        that the first has not made yet. Statistics of an instance norm need all of a map first."""
        workspace, mine = self.workspace, self.weights.nodes[step.node.name]
        operands, middle = self._operands(step), workspace.middle(step)
        strips, total, done = workspace.strips(step), workspace.sizes[step.node.level][0], 0
        for first, last in strips:
            self._first(step, operands, workspace.inner(middle, first, last), first, last)
            if not mine.norms:
                upto = last if last == total else last - 1
                self._second(step, middle, done, upto)
                done = upto
        if mine.norms:
            self._normalise(middle, strips, *mine.norms[0])
            for first, last in strips:
                self._second(step, middle, first, last)
            self._normalise(workspace.nodes[step.node.name], strips, *mine.norms[1])
            for first, last in strips:
                self._head(step, workspace.out(step, first, last), first, last)

    def _operands(self, step: Step) -> list[Tensor]:
        """The full-size maps that a node's first convolution reads."""
        nodes, node = self.workspace.nodes, step.node
        if step.source == "input":
            return [self.workspace.image]
        if step.source == "pool":
            pooled = self.workspace.beside(step)
            pool(self.workspace.inner(pooled), self.workspace.inner(nodes[f"x{node.level - 1}_0"]))
            return [pooled]
        prefix = [nodes[f"x{node.level}_{column}"] for column in node.prefix]
        return [*prefix, self._upsampled(step)] if step.form == "full" else prefix

    def _upsampled(self, step: Step) -> Tensor:
        """The low source of a node, linearly up-sampled."""
        up, low = self.workspace.beside(step), self.workspace.inner(self._low(step))
        project = self.weights.nodes[step.node.name].project
        if project:
            low = torch.addmm(project[1], as_rows(low), project[0]).view(*low.movedim(1, -1).shape[:-1], -1).movedim(-1, 1)
        target = self.workspace.inner(up)
        mode = torch.ops.aten.upsample_bilinear2d if self.plan.axes == 2 else torch.ops.aten.upsample_trilinear3d
        mode.out(low, list(target.shape[2:]), self.plan.align_corners, out=target)
        return up

    def _low(self, step: Step) -> Tensor:
        level, column = step.node.low
        return self.workspace.nodes[f"x{level}_{column}"]

    def _first(self, step: Step, operands: list[Tensor], out: Tensor, first: int, last: int) -> None:
        """Rows of the first convolution: the low source by phases, then the full-size operands onto it."""
        workspace, mine = self.workspace, self.weights.nodes[step.node.name]
        bias = mine.first_bias
        if mine.low is None:
            out.zero_()
        else:
            low = workspace.around(self._low(step), first // 2, last // 2)
            out.copy_(convolutions.convolved_up(low, mine.low, bias, workspace.edge == 1))
            bias = None
            self._add_border(step, out, first, last)
        for operand, weight in zip(operands, mine.first, strict=True):
            relu = self.fused_relu and operand is operands[-1]
            convolutions.add_conv(out, workspace.around(operand, first, last), weight, bias, relu)
            bias = None
        self._activate(out)

    def _add_border(self, step: Step, out: Tensor, first: int, last: int) -> None:
        """What the transposed convolution's bias lacks where taps fall outside the map."""
        total = self.workspace.sizes[step.node.level][0]
        spans = (0, 1), (1, total - 1), (total - 1, total)
        for place, rest, values in self.weights.nodes[step.node.name].border:
            start, stop = max(spans[place][0], first), min(spans[place][1], last)
            if start < stop:
                out[(slice(None), slice(None), slice(start - first, stop - first), *rest)] += values

    def _second(self, step: Step, middle: Tensor, first: int, last: int) -> None:
        """Rows of the second convolution and, without an instance norm, of the head."""
        mine, out = self.weights.nodes[step.node.name], self.workspace.out(step, first, last)
        out.zero_()
        convolutions.add_conv(
            out, self.workspace.around(middle, first, last), mine.second, mine.second_bias, self.fused_relu
        )
        if not mine.norms:
            self._activate(out)
            self._head(step, out, first, last)

    def _activate(self, x: Tensor) -> None:
        """What no convolution has done; an instance norm does it itself."""
        if not self.fused_relu and self.plan.norm != "instance":
            F.leaky_relu_(x, self.plan.slope)

    def _normalise(self, maps: Tensor, strips: list[tuple[int, int]], weight: Tensor, bias: Tensor) -> None:
        """Instance norm and activation of each image, in place. Statistics are those of a few rows each, put together."""
        inner, total = self.workspace.inner, strips[-1][1]
        few = max(1, SUMMED_PIXELS // math.prod(maps.shape[3:]))
        parts = [(first, min(first + few, total)) for first in range(0, total, few)]
        shares = torch.tensor([last - first for first, last in parts], dtype=torch.float64)[:, None] / total
        empty = maps.new_empty(0, dtype=torch.float32)
        for x in maps.split(1):
            found = [torch.ops.aten.batch_norm_update_stats(inner(x, *part), None, None, 0.0) for part in parts]
            means, variances = (torch.stack(values).double() for values in zip(*found, strict=True))
            mean = (shares * means).sum(dim=0)
            variance = (shares * (variances + (means - mean).square())).sum(dim=0)
            statistics = mean.float(), variance.float(), False, 0.0, self.plan.eps
            for strip in strips:
                rows = inner(x, *strip)
                torch.ops.aten.native_batch_norm.out(
                    rows, weight, bias, *statistics, out=rows, save_mean=empty, save_invstd=empty
                )
                F.leaky_relu_(rows, self.plan.slope)

    def _head(self, step: Step, out: Tensor, first: int, last: int) -> None:
        """Rows of the logits, if they are wanted here."""
        if step.node.level or step.node.column not in self.logits:
            return
        weight, bias = self.weights.heads[step.node.column]
        row = math.prod(self.workspace.sizes[0][1:])
        for x, logits in zip(out.split(1), self.logits[step.node.column], strict=True):
            torch.addmm(bias, weight, as_rows(x).T, out=logits[:, first * row : last * row])


def as_rows(x: Tensor) -> Tensor:
    """Dense maps `[N, C, *S]` as `[pixels, C]`."""
    return x.movedim(1, -1).flatten(0, -2)


def pool(out: Tensor, x: Tensor) -> None:
    """The maximum of each 2x2 (2x2x2) pixels of x."""
    phases = itertools.product((0, 1), repeat=x.ndim - 2)
    parts = [x[(..., *(slice(place, None, 2) for place in phase))] for phase in phases]
    torch.maximum(parts[0], parts[1], out=out)
    for part in parts[2:]:
        torch.maximum(out, part, out=out)
