"""Runs a plan forwards: level buffers in, logits out, nothing concatenated.

`ops` is a module with the ops of `kernels/naive.py`: the plain-PyTorch ones, or the kernels. A convolution's output is
stored raw, with a table of (mean, inverse deviation, scale, shift) for each channel, and its readers apply norm and
activation as they load it. Without a norm, or with a batch norm folded into the weights, it is stored activated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from . import compose
from .distributed import gathered_statistics, unbiased
from .kernels import naive
from .plan import Plan, Slot, Step

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MEAN, INVERSE, SCALE, SHIFT, VARIANCE = range(5)  # the first four are the rows of a table
Modes = Mapping[str, str]


@dataclass
class Maps:
    """The buffers of a pass. `levels` and `mids` hold the second and the first convolution's output of every node,
    each level's side by side; the tables `[4, 1 or N, channels]` say how to read them, None where they are activated.
    Where first outputs are not kept, the nodes of a level have one place for theirs in `mids`, and tables of their own."""

    image: Tensor
    levels: list[Tensor]
    mids: list[Tensor]
    level_tables: list[Tensor | None]
    mid_tables: list[Tensor | None]
    pools: dict[int, Tensor] = field(default_factory=dict)
    ups: dict[str, Tensor] = field(default_factory=dict)

    def out(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """A node's output and how to read it."""
        return view(self.levels[step.node.level], step.out), affine(self.level_tables[step.node.level], step.out)

    def mid(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The output of a node's first convolution and how to read it."""
        slot = self.mid_slot(step)
        return view(self.mids[step.node.level], slot), affine(self.mid_tables[step.node.level], step.out)

    def mid_slot(self, step: Step) -> Slot:
        """Beside those of the other nodes of the level if they are kept; else all in one place."""
        shared = self.mids[step.node.level].shape[-1] < self.levels[step.node.level].shape[-1]
        return Slot(0, step.out.width) if shared else step.out

    def prefix(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The first operand of a node's first convolution."""
        if step.source == "input":
            return self.image, None
        if step.source == "pool":
            return self.pools[step.node.level], None
        slot = Slot(0, step.prefix)
        return view(self.levels[step.node.level], slot), affine(self.level_tables[step.node.level], slot)

    def low(self, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The low source of a node, at its own resolution."""
        below = step.node.level + 1
        return view(self.levels[below], step.low), affine(self.level_tables[below], step.low)


def view(buffer: Tensor, slot: Slot) -> Tensor:
    return buffer[..., slot.offset : slot.end]


def affine(table: Tensor | None, slot: Slot) -> naive.Affine | None:
    return None if table is None else (table[SCALE, :, slot.offset : slot.end], table[SHIFT, :, slot.offset : slot.end])


def to_maps(x: Tensor, axes: int) -> Tensor:
    """`[N, C, *S]` as channels-last `[N, D, H, W, C]`, D = 1 in 2D."""
    return (x.unsqueeze(2) if axes == 2 else x).movedim(1, -1)


def from_maps(x: Tensor, axes: int) -> Tensor:
    """The inverse of `to_maps`, a view."""
    x = x.movedim(-1, 1)
    return x.squeeze(2) if axes == 2 else x


def allocate(plan: Plan, x: Tensor, dtype: torch.dtype, keep: bool, raw: bool) -> Maps:
    """The buffers for an input `[N, C, *S]`.

    keep: every first convolution's output stays, for a backward pass; raw: outputs are stored raw, with tables.
    """
    axes, acc = plan.axes, naive.accumulator(dtype)
    image = to_maps(x, axes).to(dtype).contiguous()
    rows = x.shape[0] if plan.norm == "instance" else 1
    levels, tables = [], []
    for level, width in enumerate(plan.widths):
        size = [image.shape[1] >> level if axes == 3 else 1, image.shape[2] >> level, image.shape[3] >> level]
        levels.append(x.new_empty((x.shape[0], *size, width), dtype=dtype))
        tables.append([x.new_empty((4, rows, width), dtype=acc) if raw else None for _ in range(2)])
    mids = [torch.empty_like(level) for level in levels] if keep else shared_mids(plan, levels)
    return Maps(image, levels, mids, [table for table, _ in tables], [table for _, table in tables])


def shared_mids(plan: Plan, levels: Sequence[Tensor]) -> list[Tensor]:
    """For each level buffer, room for the output of the first convolution of one node."""
    widest = [max(step.out.width for step in plan.steps if step.node.level == level) for level in range(len(levels))]
    return [buffer.new_empty((*buffer.shape[:4], width)) for buffer, width in zip(levels, widest, strict=True)]


@dataclass
class Forward:
    """One forward pass.

    Args:
        modes: for each norm, by name ("x0_1.norm1"): "folded" (into the weights), "frozen" (running statistics),
            "batch" (the batch's own) or "instance"; empty without a norm.
        parameters: by their names in the network, buffers too.
        group: of the processes over whose batches statistics are taken, None for this one's alone.
        operands: of both convolutions by node, from `all_operands`; composed in the pass where they are not given.
    """

    plan: Plan
    ops: ModuleType
    modes: Modes
    parameters: Mapping[str, Tensor]
    dtype: torch.dtype
    group: ProcessGroup | None = None
    operands: Mapping[str, tuple[compose.Operands, compose.Operands]] = field(default_factory=dict)
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def run(self, x: Tensor, keep: bool, recompute: bool = False) -> tuple[list[Tensor], Maps]:
        """Logits `[N, classes, *S]` of each head, and the buffers, complete for a backward pass if `keep`.

        recompute: the backward pass will compute the outputs of first convolutions again (`Backward`).
        `statistics` then holds mean and unbiased variance of each norm in mode "batch".
        """
        raw = any(mode != "folded" for mode in self.modes.values())
        maps = allocate(self.plan, x, self.dtype, keep and not recompute, raw)
        for step in self.plan.steps:
            self._node(maps, step, keep)
        return [self._head(maps, column) for column in self.plan.topology.heads], maps

    def _node(self, maps: Maps, step: Step, keep: bool) -> None:
        plan, node = self.plan, step.node
        if step.source == "pool":
            self._pool(maps, step)
        if step.form == "full":
            maps.ups[node.name] = self._upsampled(step, *maps.low(step))
        operands, second = self.operands.get(node.name) or node_operands(plan, step, self.parameters, self.modes)
        stats = self.first(maps, step, operands)
        if not keep:
            maps.ups.pop(node.name, None)
        mid, affine_mid = maps.mid(step)
        pixels = mid[..., 0].numel()
        self._normalise(f"{node.name}.norm1", stats, maps.mid_tables[node.level], step.out, pixels)
        out, _ = maps.out(step)
        stats = self.ops.conv(
            out, mid, self._cast(second.wa), axes=plan.axes, affine_a=affine_mid, slope=plan.slope,
            **self._epilogue(f"{node.name}.norm2", second),
        )  # fmt: skip
        self._normalise(f"{node.name}.norm2", stats, maps.level_tables[node.level], step.out, pixels)

    def first(self, maps: Maps, step: Step, operands: compose.Operands) -> Tensor | None:
        """Runs a node's first convolution into its place in `maps.mids`; returns the statistics that its norm needs."""
        phased = step.form == "phases"
        a, affine_a = maps.prefix(step)
        b, affine_b = maps.low(step) if phased else (maps.ups.get(step.node.name), None)
        return self.ops.conv(
            maps.mid(step)[0], a, self._cast(operands.wa), axes=self.plan.axes, stride=2 if phased else 1, phased=phased,
            slope=self.plan.slope, affine_a=affine_a, b=b, wb=self._cast(operands.wb), affine_b=affine_b,
            **self._epilogue(f"{step.node.name}.norm1", operands),
        )  # fmt: skip

    def _cast(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else cast(weight, self.dtype)

    def _epilogue(self, norm: str, operands: compose.Operands) -> dict:
        acc, mode = naive.accumulator(self.dtype), self.modes.get(norm)
        vectors = {"bias": operands.bias, "border": operands.border}
        vectors = {key: None if value is None else value.to(acc).contiguous() for key, value in vectors.items()}
        return {**vectors, "act": mode in (None, "folded"), "stats": mode in ("batch", "instance")}

    def _pool(self, maps: Maps, step: Step) -> None:
        above = next(s for s in self.plan.steps if s.node.position == (step.node.level - 1, 0))
        x, affine_x = maps.out(above)
        pooled = x.new_empty((*maps.levels[step.node.level].shape[:4], x.shape[-1]))
        self.ops.pool(pooled, x, axes=self.plan.axes, affine=affine_x, slope=self.plan.slope)
        maps.pools[step.node.level] = pooled

    def _upsampled(self, step: Step, low: Tensor, affine_low: naive.Affine | None) -> Tensor:
        prefix = f"nodes.{step.node.name}.up.project"
        weight, bias = (self.parameters.get(f"{prefix}.{name}") for name in ("weight", "bias"))
        x = from_maps(naive.read(low, affine_low, self.plan.slope), self.plan.axes)
        return to_maps(upsample(self.plan, x, weight, bias), self.plan.axes).contiguous()

    def _normalise(self, name: str, stats: Tensor | None, table: Tensor | None, slot: Slot, pixels: int) -> None:
        mode = self.modes.get(name)
        if mode in (None, "folded"):
            return
        acc = naive.accumulator(self.dtype)
        weight, bias = (self.parameters[f"nodes.{name}.{key}"].to(acc) for key in ("weight", "bias"))
        if mode == "frozen":
            mean, variance = (self.parameters[f"nodes.{name}.running_{key}"].to(acc)[None] for key in ("mean", "var"))
            inverse = (variance + self.plan.eps).rsqrt()
            scale = weight * inverse
            found = torch.stack((mean, inverse, scale, bias - mean * scale))
        else:
            count = pixels
            if mode == "batch" and self.group is not None:
                here = self.ops.norm_finalise(stats, weight, bias, self.plan.eps, False)
                stats, count = gathered_statistics(here[MEAN], here[VARIANCE], pixels, self.group)
            found = self.ops.norm_finalise(stats, weight, bias, self.plan.eps, mode == "instance")
            if mode == "batch":
                self.statistics[name] = (found[MEAN, 0], unbiased(found[VARIANCE, 0], count))
        table[:, :, slot.offset : slot.end] = found[:VARIANCE]

    def _head(self, maps: Maps, column: int) -> Tensor:
        plan = self.plan
        step = head_step(plan, column)
        x, affine_x = maps.out(step)
        weight, bias = (self.parameters[f"heads.{step.node.name}.{key}"] for key in ("weight", "bias"))
        out = x.new_empty((x.shape[0], weight.shape[0], *x.shape[1:4]))
        acc = naive.accumulator(self.dtype)
        self.ops.head(out, x, weight.flatten(1).to(self.dtype), bias.to(acc), affine=affine_x, slope=plan.slope)
        return out.squeeze(2) if plan.axes == 2 else out


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the ops take it, rounded and laid out in one copy where both are needed."""
    return weight.to(dtype, memory_format=torch.contiguous_format).contiguous()


def head_step(plan: Plan, column: int) -> Step:
    """The step of the node that a head stands on."""
    return next(step for step in plan.steps if step.node.position == (0, column))


def upsample(plan: Plan, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Linear up-sampling of `[N, C, *S]`, after a 1x1 convolution if the plan projects: the one map materialised."""
    if weight is not None:
        x = (F.conv2d if plan.axes == 2 else F.conv3d)(x, weight.to(x.dtype), bias.to(x.dtype))
    mode = "bilinear" if plan.axes == 2 else "trilinear"
    return F.interpolate(x, scale_factor=2, mode=mode, align_corners=plan.align_corners)


def upsampling(plan: Plan, step: Step, parameters: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Weight (as `compose.phase_weights` takes it) and bias of a node's up-sampling by phases, None where it has none."""
    name = f"nodes.{step.node.name}.up"
    if step.form == "phases" and plan.upsample == "deconv":
        return parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if step.form == "phases" and plan.project:
        return parameters[f"{name}.project.weight"].transpose(0, 1), parameters[f"{name}.project.bias"]
    return None, None


def first_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> compose.Operands:
    """Weights of a node's first convolution in the engine's form."""
    weight, bias = _folded(plan, f"{step.node.name}.norm1", f"nodes.{step.node.name}.conv1", parameters, modes)
    return compose.first_operands(weight, bias, prefix_width(step, weight), step.form, *upsampling(plan, step, parameters))


def prefix_width(step: Step, weight: Tensor) -> int:
    """Input channels of a node's first convolution that do not come from below."""
    return step.prefix if step.source == "prefix" else weight.shape[1]


def second_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> compose.Operands:
    """As `first_operands`, of the second convolution."""
    name = f"{step.node.name}.norm2"
    weight, bias = _folded(plan, name, f"nodes.{step.node.name}.conv2", parameters, modes)
    return compose.Operands(compose.taps_first(weight), bias=bias)


def node_operands(
    plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes
) -> tuple[compose.Operands, compose.Operands]:
    """Of both convolutions of a node."""
    return first_operands(plan, step, parameters, modes), second_operands(plan, step, parameters, modes)


def all_operands(
    plan: Plan, parameters: Mapping[str, Tensor], modes: Modes, dtype: torch.dtype
) -> dict[str, tuple[compose.Operands, compose.Operands]]:
    """`Forward.operands`: composed in the parameters' precision and rounded as the ops take them."""
    acc = naive.accumulator(dtype)

    def rounded(found: compose.Operands) -> compose.Operands:
        parts = zip(found.tensors(), (dtype, dtype, acc, acc), strict=True)
        return compose.Operands(*(None if value is None else cast(value, kind) for value, kind in parts))

    return {step.node.name: tuple(map(rounded, node_operands(plan, step, parameters, modes))) for step in plan.steps}


def _folded(
    plan: Plan, norm: str, conv: str, parameters: Mapping[str, Tensor], modes: Modes
) -> tuple[Tensor, Tensor | None]:
    weight, bias = parameters[f"{conv}.weight"], parameters.get(f"{conv}.bias")
    if modes.get(norm) != "folded":
        return weight, bias
    keys = ("weight", "bias", "running_mean", "running_var")
    wide = torch.promote_types(weight.dtype, torch.float32)
    parts = tuple(parameters[f"nodes.{norm}.{key}"].to(wide) for key in keys)
    return compose.fold(weight.to(wide), None if bias is None else bias.to(wide), parts, plan.eps)
