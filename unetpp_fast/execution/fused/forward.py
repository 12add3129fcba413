"""Runs a plan forwards: level buffers in, logits out, nothing concatenated.

`ops` is a module with the ops of `kernels/naive.py`: those in plain PyTorch, or the kernels. The output of a convolution is
stored raw, with a table of (mean, inverse deviation, scale, shift) per channel; its readers apply norm and activation as
they load it. Without a norm, or with a batch norm folded into the weights, it is stored activated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.distributed as dist  # whose parts need not be there: a torch may be built without them
from torch import Tensor

from ...kernels import naive
from ..batch_statistics import gathered_statistics
from ..call import Inputs, inputs_of
from ..plan.operands import Modes, cast, node_operands
from ..plan.steps import Plan, Slot, Step, head_step
from ..plan.weight_composition import Operands, taps_first, taps_last
from .buffers import Maps, allocate, from_maps, to_maps, view
from .gates import Gate, joined
from .ops import read, reads_linear, takes_views
from .slices import Strided, of_pool, of_step
from .upsampling import even, projected, upsampling


@dataclass
class Forward:
    """One forward pass.

    Args:
        modes: for each norm, by name ("x0_1.norm1"): "folded" (into the weights), "frozen" (running statistics),
            "batch" (the batch's own) or "instance"; empty without a norm.
        parameters: by their names in the network, buffers too.
        group: the processes over whose batches statistics are taken; None for this process only.
        operands: of both convolutions of each node, from `all_operands`; composed during the pass if not given.
    """

    plan: Plan
    ops: ModuleType
    modes: Modes
    parameters: Mapping[str, Tensor]
    dtype: torch.dtype
    group: dist.ProcessGroup | None = None
    operands: Mapping[str, tuple[Operands, Operands]] = field(default_factory=dict)

    def run(
        self, x: Inputs, keep: bool, recompute: bool = False, maps: Maps | None = None, columns: Sequence[int] | None = None
    ) -> tuple[list[Tensor], Maps]:
        """Logits `[N, classes, *S]` of each head, and the buffers, complete for a backward pass if `keep`.

        x: the image, or the given maps. recompute: the backward pass recomputes what first convolutions give (`Backward`).
        maps: the buffers of an earlier pass of this size to use again. columns: of the heads to compute, default all.
        Afterwards `moments` `[2, sum of widths]` holds the mean and unbiased variance of each norm in mode "batch", those of
        the first in the plan's order first; None if there is none.
        """
        inputs = inputs_of(x)
        self.moments, self.places = None, moment_places(self.plan, self.modes)
        if self.places:
            width = max(slot.end for slot in self.places.values())
            self.moments = inputs[0].new_empty((2, width), dtype=naive.accumulator(self.dtype))
        raw = any(mode != "folded" for mode in self.modes.values())
        if maps is None:
            maps = self.allocate(inputs, keep, raw, recompute)
        elif maps.image is not None:
            maps.image.copy_(to_maps(inputs[0], self.plan.axes))
        given = {step.node.level: x for step, x in zip(self.plan.inputs, inputs, strict=True)}
        for step in self.plan.steps:
            if step.source == "given":
                maps.out(step)[0].copy_(to_maps(given[step.node.level], self.plan.axes))
            else:
                self._node(maps, step, keep)
        return [
            self._head(maps, column) for column in self.plan.topology.heads if columns is None or column in columns
        ], maps

    def allocate(self, inputs: Sequence[Tensor], keep: bool, raw: bool, recompute: bool = False) -> Maps:
        """Buffers for a pass; arguments as those of `buffers.allocate`."""
        pairs = not keep and not raw and self.plan.axes == 2
        rows = getattr(self.ops, "pair_rows", None) if pairs else None
        return allocate(self.plan, inputs, self.dtype, keep, raw, recompute, rows)

    def _node(self, maps: Maps, step: Step, keep: bool) -> None:
        plan, node = self.plan, step.node
        if step.source == "pool":
            self._pool(maps, step)
        operands, second = self.operands.get(node.name) or node_operands(plan, step, self.parameters, self.modes)
        if maps.paired(step):
            self._pair(maps, step, operands, second)
            self._gate(maps, step)
            return
        stats = self.first(maps, step, operands)
        mid, affine_mid = maps.mid(step)
        pixels = mid[..., 0].numel()
        self._normalise(f"{node.name}.norm1", stats, maps.mid_tables[node.level], step.out, pixels)
        stats = of_step(self.ops, step).conv(
            maps.raw(step)[0], mid, self._cast(second.wa), axes=plan.axes, affine_a=affine_mid, slope=plan.slope,
            **self._epilogue(f"{node.name}.norm2", second),
        )  # fmt: skip
        self._normalise(f"{node.name}.norm2", stats, maps.level_tables[node.level], step.out, pixels)
        self._gate(maps, step)

    def _gate(self, maps: Maps, step: Step) -> None:
        """Scales the output of a node, where the plan has gates."""
        if self.plan.gates:
            gate = Gate(f"nodes.{step.node.name}.attention2", self.parameters)
            maps.out(step)[0].copy_(gate.forward(read(self.ops, *maps.raw(step), self.plan.slope)))

    def _operand(self, maps: Maps, step: Step) -> tuple[Tensor, naive.Affine | None]:
        """The first operand of a node's first convolution and how to read it."""
        if step.source != "gated":
            return maps.prefix(step)
        gate = Gate(f"nodes.{step.node.name}.attention1", self.parameters)
        return gate.forward(joined(self.plan, step, self.parameters, maps)), None

    def _pair(self, maps: Maps, step: Step, first: Operands, second: Operands) -> None:
        """Runs both convolutions of a node, of which the first is not stored as a whole."""
        epilogue = self._epilogue(f"{step.node.name}.norm1", first)
        b, _, linear = self._low(maps, step)
        self.ops.conv_pair(
            maps.out(step)[0], view(maps.mids[step.node.level], maps.mid_slot(step)), self._operand(maps, step)[0],
            self._cast(first.wa), self._cast(second.wa), phased=step.form == "phases",
            b=b, wb=self._cast(first.wb), linear=linear, bias=epilogue["bias"], border=epilogue["border"],
            second_bias=self._epilogue(f"{step.node.name}.norm2", second)["bias"], slope=self.plan.slope,
        )  # fmt: skip

    def first(self, maps: Maps, step: Step, operands: Operands) -> Tensor | None:
        """Runs a node's first convolution into `maps.mids`; returns the statistics for its norm."""
        if step.source == "unlike":
            return self._strided(maps, step, operands)
        phased = step.form == "phases"
        stride = 2 if phased or step.source == "stride" else 1
        a, affine_a = self._operand(maps, step)
        b, affine_b, linear = self._low(maps, step)
        options = {} if linear is None else {"linear": linear}
        return of_step(self.ops, step).conv(
            maps.mid(step)[0], a, self._cast(operands.wa), axes=self.plan.axes, stride=stride, phased=phased,
            slope=self.plan.slope, affine_a=affine_a, plain=maps.plain(step), b=b, wb=self._cast(operands.wb),
            affine_b=affine_b, **options, **self._epilogue(f"{step.node.name}.norm1", operands),
        )  # fmt: skip

    def _strided(self, maps: Maps, step: Step, operands: Operands) -> Tensor | None:
        """As `first`, where strides and taps differ between axes."""
        weight = self.parameters[f"nodes.{step.node.name}.conv1.weight"]
        layer = Strided(taps_last(operands.wa, weight.shape[2:]), self.plan.topology.stride(step.node.level))
        epilogue = self._epilogue(f"{step.node.name}.norm1", operands)
        x = read(self.ops, *maps.prefix(step), self.plan.slope)
        return layer.forward(maps.mid(step)[0], x, epilogue["bias"], self.plan.slope, epilogue["act"], epilogue["stats"])

    def _cast(self, weight: Tensor | None) -> Tensor | None:
        return None if weight is None else cast(weight, self.dtype, not takes_views(self.ops))

    def _epilogue(self, norm: str, operands: Operands) -> dict:
        acc, mode = naive.accumulator(self.dtype), self.modes.get(norm)
        vectors = {"bias": operands.bias, "border": operands.border}
        vectors = {key: None if value is None else value.to(acc).contiguous() for key, value in vectors.items()}
        return {**vectors, "act": mode in (None, "folded"), "stats": mode in ("batch", "instance")}

    def _pool(self, maps: Maps, step: Step) -> None:
        above = next(s for s in self.plan.steps if s.node.position == (step.node.level - 1, 0))
        x, affine_x = maps.out(above)
        pooled = maps.pools.get(step.node.level)
        if pooled is None:
            pooled = x.new_empty((*maps.levels[step.node.level].shape[:4], x.shape[-1]))
        ops, axes = of_pool(self.ops, self.plan, step)
        ops.pool(pooled, even(x, axes), axes=axes, affine=affine_x, slope=self.plan.slope)
        maps.pools[step.node.level] = pooled

    def _low(self, maps: Maps, step: Step) -> tuple[Tensor | None, naive.Affine | None, bool | None]:
        """The low source of a node, how to read it, and the option `linear` of `naive.conv`."""
        if step.form is None:
            return None, None, None
        if step.form == "phases":
            return (*maps.low(step), None)
        if self.plan.beforehand or not reads_linear(self.ops):
            return upsampling(self.plan, step, self.parameters, maps).forward(*maps.low(step)), None, None
        return (*projected(self.plan, step, self.parameters, *maps.low(step)), bool(self.plan.align_corners))

    def _normalise(self, name: str, stats: Tensor | None, table: Tensor | None, slot: Slot, pixels: int) -> None:
        mode = self.modes.get(name)
        if mode in (None, "folded"):
            return
        acc, rows = naive.accumulator(self.dtype), view(table, slot)
        weight, bias = (self.parameters[f"nodes.{name}.{key}"].to(acc) for key in ("weight", "bias"))
        if mode == "frozen":
            mean, variance = (self.parameters[f"nodes.{name}.running_{key}"].to(acc)[None] for key in ("mean", "var"))
            inverse = (variance + self.plan.eps).rsqrt()
            scale = weight * inverse
            rows.copy_(torch.stack((mean, inverse, scale, bias - mean * scale)))
        else:
            moments = view(self.moments, self.places[name]) if mode == "batch" else None
            if mode == "batch" and self.group is not None:
                self.ops.norm_table(rows, stats, weight, bias, self.plan.eps, False, moments)
                stats = gathered_statistics(moments, pixels, self.group)
            self.ops.norm_table(rows, stats, weight, bias, self.plan.eps, mode == "instance", moments)

    def _head(self, maps: Maps, column: int) -> Tensor:
        plan = self.plan
        step = head_step(plan, column)
        x, affine_x = maps.out(step)
        weight, bias = (self.parameters.get(f"heads.{step.node.name}.{key}") for key in ("weight", "bias"))
        acc = naive.accumulator(self.dtype)
        bias = x.new_zeros(weight.shape[0], dtype=acc) if bias is None else bias.to(acc)
        if plan.head_taps == 3:
            out = x.new_empty((*x.shape[:4], weight.shape[0]))
            taps = self._cast(taps_first(weight))
            self.ops.conv(out, x, taps, axes=plan.axes, affine_a=affine_x, slope=plan.slope, bias=bias)
            return from_maps(out, plan.axes)
        out = x.new_empty((x.shape[0], weight.shape[0], *x.shape[1:4]))
        self.ops.head(out, x, weight.flatten(1).to(self.dtype), bias, affine=affine_x, slope=plan.slope)
        return out.squeeze(2) if plan.axes == 2 else out


def moment_places(plan: Plan, modes: Modes) -> dict[str, Slot]:
    """The channels of `Forward.moments` that each norm in mode "batch" has, by name."""
    places, start = {}, 0
    for step in plan.steps:
        for name in (f"{step.node.name}.norm1", f"{step.node.name}.norm2"):
            if modes.get(name) == "batch":
                places[name] = Slot(start, step.out.width)
                start += step.out.width
    return places
