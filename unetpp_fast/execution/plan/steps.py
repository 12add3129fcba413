"""The plan of a fused pass: what is computed, node by node.

Each level of the grid owns one channels-last buffer `[N, D, H, W, sum of widths]`, in which the channels of node X(i,j)
follow those of X(i,0..j-1). So the concatenation of X(i,0..j-1) is the leading channels of that buffer: one operand, nothing
copied. A `Plan` says which channels each node reads and writes and in which form it reads its low source. The engine runs it
forwards and backwards; `print(plan)` shows it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from ...architecture.options import ACTIVATIONS, ENGINES, NORMS, UPSAMPLES, Option, parse_option
from ...architecture.options import unsupported as options_unsupported
from ...architecture.topology import Node, Topology

HOW = {  # in words
    "deconv": "by a transposed convolution", "linear": "linearly", "nearest": "to its nearest neighbours",
    "pixelshuffle": "by shuffled channels",
}  # fmt: skip
Options = Mapping[str, Option | float | bool | None]


@dataclass(frozen=True)
class Slot:
    """Channels [offset, offset + width) of a level's buffer."""

    offset: int
    width: int

    @property
    def end(self) -> int:
        return self.offset + self.width


@dataclass(frozen=True)
class Step:
    """One node: conv1 over its operands, conv2 over conv1, the result into `out`.

    source: of the first operand: "input", "pool" (of the level above), "stride" (the level above, of which the convolution
    reads every second pixel), "prefix" (the leading `prefix` channels of the node's level), "low" (there is none beside
    the low source) or "gated" (the prefix and the up-sampled low source in one map, scaled by a gate); "given" for a node
    that is not computed. prefix: of "stride", the channels above. form: how the low source `low`, channels of the level
    below, is read beside the first operand: None, "phases" (at low resolution) or "full" (up-sampled). flat: its
    convolutions have one tap along the first axis of a volume. Of "unlike" the kernel has 3 taps along an axis that its
    stride does not halve; else as "stride".
    """

    node: Node
    out: Slot
    source: str
    prefix: int
    low: Slot | None
    form: str | None
    flat: bool = False


@dataclass(frozen=True)
class Plan:
    """The steps of a pass, the widths of the level buffers and the options that all nodes share.

    norm: None, "batch" or "instance"; slope: of the leaky ReLU, 0 for ReLU; upsample: its name and keywords; head_taps: of
    the heads' convolutions along an axis, 1 or 3; no_bias: what else of "up" and "head" has no bias;
    beforehand: low sources are always up-sampled into a map (`fused/upsampling.py`), never as they are read. gates: outputs
    are scaled by scSE gates, and the inputs of nodes whose source is "gated" (`fused/gates.py`).
    """

    topology: Topology
    steps: tuple[Step, ...]
    widths: tuple[int, ...]
    norm: str | None
    eps: float
    momentum: float | None
    slope: float
    upsample: str
    align_corners: bool | None
    project: bool
    bias: bool
    head_taps: int = 1
    no_bias: tuple[str, ...] = ()
    beforehand: bool = False
    gates: bool = False

    @property
    def axes(self) -> int:
        return self.topology.spatial_dims

    @cached_property
    def of_odd_sizes(self) -> Plan:
        """The same where some sizes are not twice those of the level below: no phases."""
        steps = tuple(dataclasses.replace(step, form=step.form and "full") for step in self.steps)
        return dataclasses.replace(self, steps=steps, beforehand=True)

    @cached_property
    def computed(self) -> tuple[Step, ...]:
        """The steps of the nodes that are not given."""
        return tuple(step for step in self.steps if step.source != "given")

    @cached_property
    def inputs(self) -> tuple[Step, ...]:
        """The steps that take an input of the pass, in its order: the image, or the given maps, largest first."""
        found = [step for step in self.steps if step.source in ("input", "given")]
        return tuple(sorted(found, key=lambda step: step.node.level))

    @cached_property
    def given(self) -> tuple[int, ...]:
        """Per level, the channels of its given map, which is stored as it is; 0 without one."""
        return tuple(
            sum(step.out.width for step in self.steps if step.source == "given" and step.node.level == level)
            for level in range(len(self.widths))
        )

    @cached_property
    def least_widths(self) -> tuple[int, ...]:
        """`widths` without the last node of each level that may write over X(i,0), since all of its readers ran before."""
        found = []
        for level, width in enumerate(self.widths):
            mine = [step for step in self.steps if step.node.level == level]
            first, last = mine[0], mine[-1]
            may = last is not first and last.out.end == width and last.out.width <= first.out.width
            found.append(last.out.offset if may and not self._is_read_after(first.node.position, last) else width)
        return tuple(found)

    @cached_property
    def prefix_widths(self) -> tuple[int, ...]:
        """Per level, the width of its longest prefix; what lies beyond is only read as a low source, by a pool or a head."""
        found = [0] * len(self.widths)
        for step in self.steps:
            if step.source in ("prefix", "gated"):
                found[step.node.level] = max(found[step.node.level], step.prefix)
        return tuple(found)

    def _is_read_after(self, position: tuple[int, int], last: Step) -> bool:
        """Whether a node is read by a head, or by a node that runs after the step `last`."""
        level, column = position
        later = [step.node for step in self.steps[self.steps.index(last) + 1 :]]
        pooled = any(node.position == (level + 1, 0) for node in later) and column == 0
        direct = any(node.low == position or (node.level == level and column in node.prefix) for node in later)
        return pooled or direct or (level == 0 and column in self.topology.heads)

    def __str__(self) -> str:
        return "\n".join(self.describe(step) for step in self.steps)

    def describe(self, step: Step) -> str:
        """One line about a node, for `explain`."""
        node, (i, j) = step.node, step.node.position
        if step.source == "input":
            reads = f"the image, {self.topology.in_channels} channels"
        elif step.source == "pool":
            reads = f"the pooled X({i - 1},0), {self.topology[i - 1, 0].width} channels"
        elif step.source in ("stride", "unlike"):
            reads = f"every second pixel of X({i - 1},0), {self.topology[i - 1, 0].width} channels"
        elif step.source == "given":
            return f"X({i},{j}) -> channels {step.out.offset}..{step.out.end - 1} of level {i}; a copy of the encoder's map"
        else:
            names = ", ".join(f"X({i},{column})" for column in node.prefix)
            low = f"X({i + 1},{j - 1})"
            how = {
                "phases": f"{low} at its own resolution, {step.low.width} channels",
                "full": f"{low} up-sampled {HOW[self.upsample]}, {node.up_width} channels",
            }["full" if step.source == "gated" else step.form]
            place = "" if step.source == "gated" else " in place"
            reads = f"{names}{place}, {step.prefix} channels, and {how}" if names else how
            reads += ", in one gated map" if step.source == "gated" else ""
        reads += ", slice by slice" if step.flat else ""
        reads += "; its output is gated by PyTorch's operators" if self.gates else ""
        return f"X({i},{j}) -> channels {step.out.offset}..{step.out.end - 1} of level {i}; reads {reads}"


def unsupported(topology: Topology, options: Options | None = None) -> str:
    """Why a network has no plan; "" if it has one.

    Its prefixes must be the leading channels of their level, and some backend must be able to compute its options.
    """
    if topology.unlike_axes and (reason := _unlike_axes(topology, options or {})):
        return reason
    reasons = [options_unsupported(options or {}, backend) for backend in ENGINES]
    if all(reasons):
        return reasons[0]
    for node in topology.nodes:
        columns = sorted(other.column for other in topology.nodes if other.level == node.level)
        if node.column and node.prefix != tuple(columns[: len(node.prefix)]):
            return f"X{node.position} does not read the leading nodes of its level"
    return ""


FLAT, FLAT_STRIDE = (1, 3, 3), (1, 2, 2)


def _unlike_axes(topology: Topology, options: Options) -> str:
    """Why strides and kernels that differ between axes have no plan; "" if they have one."""
    if options.get("odd_sizes"):
        return "strides and kernels that differ between axes run on the reference where sizes may be odd"
    kernels = {node.kernel for node in topology.nodes} - {None, FLAT}
    if kernels or set(topology.strides) - {FLAT_STRIDE, (2, 2, 2)}:
        return "of strides and kernels that differ between axes, others than (1, 2, 2) and (1, 3, 3) run on the reference"
    return ""


def make_plan(topology: Topology, options: Options) -> Plan:
    """The plan of a network with these options (`Network.options`).

    Raises:
        ValueError: there is none; `unsupported` says why.
    """
    reason = unsupported(topology, options)
    if reason:
        raise ValueError(reason)
    frozen = {key: (value[0], tuple(sorted(value[1].items()))) if isinstance(value, (tuple, list)) else value
              for key, value in options.items()}  # fmt: skip
    return _make_plan(topology, tuple(sorted(frozen.items(), key=lambda item: item[0])))


@lru_cache(maxsize=64)
def _make_plan(topology: Topology, options: tuple) -> Plan:
    given: dict[str, Any] = {
        key: (value[0], dict(value[1])) if isinstance(value, tuple) else value for key, value in options
    }
    norm, norm_keywords = (None, {}) if given["norm"] is None else parse_option(given["norm"], "norm", NORMS)
    act, act_keywords = parse_option(given["act"], "act", ACTIVATIONS)
    upsample, up_keywords = parse_option(given["upsample"], "upsample", UPSAMPLES)
    slots, widths = _slots(topology)
    unlike = topology.unlike_axes
    form = "phases" if UPSAMPLES[upsample].phases and not unlike else "full"
    steps = []
    for node in topology.nodes:
        source = _source(topology, node, given.get("downsample", "pool"))
        gated = bool(given.get("attention")) and node.column > 0 and node.level > 0  # at the image's size are last blocks
        source = "gated" if gated else source
        prefix = sum(topology[node.level, column].width for column in node.prefix)
        prefix = topology[node.level - 1, 0].width if source == "stride" else prefix
        low = slots[node.low] if node.column else None
        flat = node.kernel is not None
        if source == "stride" and topology.stride(node.level) != (FLAT_STRIDE if flat else (2,) * topology.spatial_dims):
            source = "unlike"
        how = form if node.column and not gated else None
        steps.append(Step(node, slots[node.position], source, prefix, low, how, flat))
    return Plan(
        topology, tuple(steps), widths, norm, norm_keywords.get("eps", 1e-5), norm_keywords.get("momentum", 0.1),
        ACTIVATIONS[act].slope(act_keywords), upsample, up_keywords.get("align_corners"),
        bool(up_keywords.get("project", False)), bool(given["bias"]), given.get("head_taps", 1),
        ("up",) * (not up_keywords.get("bias", True)) + ("head",) * (not given.get("head_bias", True)),
        unlike or not (UPSAMPLES[upsample].phases or upsample == "linear"), bool(given.get("attention")),
    )  # fmt: skip


def _source(topology: Topology, node: Node, downsample: str) -> str:
    if node.column:
        return "prefix" if node.prefix else "low"
    return "given" if topology.given else downsample if node.level else "input"


def _slots(topology: Topology) -> tuple[dict[tuple[int, int], Slot], tuple[int, ...]]:
    slots, widths = {}, []
    for level in range(topology.depth + 1):
        offset = 0
        for node in sorted((node for node in topology.nodes if node.level == level), key=lambda node: node.column):
            slots[node.position] = Slot(offset, node.width)
            offset += node.width
        widths.append(offset)
    return slots, tuple(widths)


def head_step(plan: Plan, column: int) -> Step:
    """The step of the node under a head."""
    return next(step for step in plan.steps if step.node.position == (0, column))
