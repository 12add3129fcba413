"""Runs a plan backwards: one gradient buffer per level, with the layout of the level buffer; the last node has its own.

Columns are processed from last to first. The data gradient of a node is added to the whole prefix at once, and through
phases to the slice of the level below; the first contribution to a slice writes, later ones add. Weight gradients are
computed for the composed operands and mapped back to the parameters by `plan/weight_composition.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import ModuleType

import torch
import torch.distributed as dist  # whose parts need not be there: a torch may be built without them
from torch import Tensor

from ...kernels import naive
from ..batch_statistics import averages_of
from ..plan import weight_composition
from ..plan.operands import GradientOperands, Modes, cast, conv1_operands, gradient_operands, prefix_width, up_parameters
from ..plan.steps import Plan, Slot, Step
from .buffers import Maps, from_maps, to_maps, view
from .composed import Composed
from .forward import Forward
from .gates import Gate, joined
from .ops import read, takes_views
from .slices import Strided, of_pool, of_step
from .upsampling import even, upsampling


class Backward:
    """The backward pass of a `Forward` and its `Maps`; arguments as there.

    recompute: `Maps.mids` is empty, with room for one node per level, whose first convolution runs again.
    composed: the weights of all nodes, if the forward pass kept them; the gradients of operands are then collected in
    `parts`, as `Composed.gradients` takes them, and not those of convolutions' and up-samplings' weights in `gradients`.
    """

    def __init__(
        self,
        plan: Plan,
        ops: ModuleType,
        modes: Modes,
        parameters: Mapping[str, Tensor],
        dtype: torch.dtype,
        group: dist.ProcessGroup | None = None,
        recompute: bool = False,
        composed: Composed | None = None,
    ):
        self.plan, self.ops, self.modes, self.parameters, self.dtype = plan, ops, modes, parameters, dtype
        self.group, self.recompute, self.composed = group, recompute, composed
        self.parts: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        self.written: set[tuple[int, int]] = set()  # (level, column) of slices that hold a gradient

    def run(self, maps: Maps, outputs: Sequence[Tensor | None], needs_input: bool) -> list[Tensor]:
        """From the gradients of the heads' logits (None for no gradient), those of the inputs, `[N, C, *S]`, if they are
        needed, in the order of `Plan.inputs`.

        Afterwards `gradients` holds those of the parameters, by name.
        """
        self.rooms = self.plan.prefix_widths
        self.levels: list[Tensor | None] = [None] * len(maps.levels)
        self.last: dict[int, Tensor] = {}
        self.mid: Tensor | None = None
        acc, widest = naive.accumulator(self.dtype), max(node.width for node in self.plan.topology.nodes)
        self.zeros = maps.levels[0].new_zeros(widest + 1, dtype=acc)  # wider than any bias: none takes all of its memory
        of_inputs: dict[int, Tensor] = {}
        by_column = dict(zip(self.plan.topology.heads, outputs, strict=True))
        for step in sorted(reversed(self.plan.steps), key=lambda step: -step.node.column):
            if step.node.level == 0 and by_column.get(step.node.column) is not None:
                self._head(maps, step, by_column[step.node.column])
            if step.source == "given":
                if needs_input:
                    gradient = self._gradient(maps, step.node.level, step.out)
                    gradient = gradient if step.node.position in self.written else gradient.zero_()
                    of_inputs[step.node.level] = from_maps(gradient, self.plan.axes)
                self.last.pop(step.node.level, None)
            elif step.node.position in self.written:
                gradient = self._node(maps, step, needs_input)
                if gradient is not None:
                    of_inputs[step.node.level] = gradient
            if not step.node.column:  # the last of its level
                self.levels[step.node.level] = None
        del self.levels, self.last, self.mid
        return [gradient for _, gradient in sorted(of_inputs.items(), key=lambda item: item[0])]

    def _gradient(self, maps: Maps, level: int, slot: Slot) -> Tensor:
        """Where the gradient of a slot of a level is: in the level's buffer, or beside it for the last node, which is in no
        prefix. Either is made when it is first needed; the latter is gone after its node."""
        place, room = maps.levels[level], self.rooms[level]
        if slot.offset >= room:
            if level not in self.last:
                self.last[level] = place.new_empty((*place.shape[:4], slot.width))
            return self.last[level]
        if self.levels[level] is None:
            self.levels[level] = place.new_empty((*place.shape[:4], room))
        return view(self.levels[level], slot)

    def _add(self, name: str, gradient: Tensor | None) -> None:
        if gradient is not None:
            have = self.gradients.get(name)
            self.gradients[name] = gradient if have is None else have + gradient

    def _gradient_of_mid(self, step: Step, mid: Tensor) -> Tensor:
        """Room for the gradient of a first convolution: that of the nodes after it, which are done, or new memory.

        On a CPU always the latter, as maps whose pixels lie side by side are faster to go through there; one place for all.
        """
        if takes_views(self.ops):
            if self.mid is None or self.mid.numel() < mid.numel():
                self.mid = None  # gone before its successor is there
                self.mid = mid.new_empty(mid.numel())
            return self.mid[: mid.numel()].view(mid.shape)
        beside = Slot(step.out.end, step.out.width)
        if beside.end <= self.rooms[step.node.level]:
            return view(self.levels[step.node.level], beside)
        return torch.empty_like(mid, memory_format=torch.contiguous_format)

    def _claim(self, maps: Maps, level: int, columns: Sequence[int]) -> bool:
        """Whether a contribution to these slices must add (something is there) or write."""
        new = [column for column in columns if (level, column) not in self.written]
        self.written |= {(level, column) for column in columns}
        if len(new) < len(columns):
            for column in new:
                self._gradient(maps, level, self._slot(level, column)).zero_()
        return len(new) < len(columns)

    def _slot(self, level: int, column: int) -> Slot:
        return next(step.out for step in self.plan.steps if step.node.position == (level, column))

    def _head(self, maps: Maps, step: Step, dy: Tensor) -> None:
        x, affine_x = maps.out(step)
        name = f"heads.{step.node.name}"
        weight = self.parameters[f"{name}.weight"]
        if self.plan.head_taps == 3:
            self._wide_head(maps, step, dy)
            return
        dy = (dy.unsqueeze(2) if self.plan.axes == 2 else dy).to(self.dtype).contiguous()
        add = self._claim(maps, 0, [step.node.column])
        gw, gb = self.ops.head_backward(
            self._gradient(maps, 0, step.out),
            dy,
            x,
            weight.flatten(1).to(self.dtype),
            affine=affine_x,
            slope=self.plan.slope,
            add=add,
        )
        self._add(f"{name}.weight", gw.view_as(weight).to(weight.dtype))
        self._add_bias(f"{name}.bias", gb)

    def _wide_head(self, maps: Maps, step: Step, dy: Tensor) -> None:
        """As `_head`, of a head that is a convolution of 3 taps along an axis."""
        (x, affine_x), axes, name = maps.out(step), self.plan.axes, f"heads.{step.node.name}"
        weight = self.parameters[f"{name}.weight"]
        g = to_maps(dy, axes).to(self.dtype).contiguous()
        gw = self.ops.conv_wgrad(x, g, axes=axes, affine=affine_x, slope=self.plan.slope)[0]
        self._add(f"{name}.weight", weight_composition.taps_last(gw, axes))
        self._add(f"{name}.bias", g.sum((0, 1, 2, 3), dtype=naive.accumulator(self.dtype)))
        back = self._cast(weight_composition.flipped(weight_composition.taps_first(weight)))
        add = self._claim(maps, 0, [step.node.column])
        self.ops.conv(self._gradient(maps, 0, step.out), g, back, axes=axes, add=add)

    def _node(self, maps: Maps, step: Step, needs_input: bool) -> Tensor | None:
        """Through a node whose output gradient is complete; returns the gradient of the image if the node reads it."""
        plan, node = self.plan, step.node
        g, name = self._gradient(maps, node.level, step.out), f"nodes.{node.name}"
        if self.recompute:
            stored = dict.fromkeys(self.modes, "frozen")  # raw, without statistics: the tables hold them
            again = Forward(plan, self.ops, stored, self.parameters, self.dtype)
            first = self.composed.operands[node.name][0] if self.composed else None
            again.first(maps, step, first or conv1_operands(plan, step, self.parameters, stored))
        mid, affine_mid = maps.mid(step)
        out, affine_out = maps.raw(step)
        if plan.gates:
            gate = Gate(f"{name}.attention2", self.parameters)
            g.copy_(self._through_gate(gate, g, read(self.ops, out, affine_out, plan.slope)))
        total = self._through_norm(f"{node.name}.norm2", g, out, maps.level_tables[node.level], step.out)
        ops = of_step(self.ops, step)
        gw = ops.conv_wgrad(mid, g, axes=plan.axes, affine=affine_mid, slope=plan.slope)[0]
        if self.composed:
            self.parts[f"{node.name} second"] = gw
        else:
            taps = self.parameters[f"{name}.conv2.weight"].shape[2:]
            self._add(f"{name}.conv2.weight", weight_composition.taps_last(gw, taps))
        self._add_bias(f"{name}.conv2.bias", total)
        g_mid = self._gradient_of_mid(step, mid)
        weights = self.composed.of_gradients(step) if self.composed else gradient_operands(plan, step, self.parameters)
        ops.conv(g_mid, g, self._cast(weights.second), axes=plan.axes)
        del g
        if step.out.offset >= self.rooms[node.level]:
            del self.last[node.level]
        return self._first(maps, step, g_mid, weights, needs_input)

    def _first(self, maps: Maps, step: Step, g: Tensor, weights: GradientOperands, needs_input: bool) -> Tensor | None:
        """Through the first convolution of a node, from the gradient of its activated output."""
        node = step.node
        mid, _ = maps.mid(step)
        total = self._through_norm(f"{node.name}.norm1", g, mid, maps.mid_tables[node.level], step.out)
        if step.source == "gated":
            x = joined(self.plan, step, self.parameters, maps)
            gate = Gate(f"nodes.{node.name}.attention1", self.parameters)
            self._first_parameters(maps, step, g, total, (gate.forward(x), None))
            self._into_gated(maps, step, g, weights.prefix, gate, x)
            return None
        if step.source == "unlike":
            self._add_bias(f"nodes.{node.name}.conv1.bias", total)
            self._through_strided(maps, step, g)
            return None
        self._first_parameters(maps, step, g, total, maps.prefix(step))
        gradient = self._into_prefix(maps, step, g, weights.prefix, needs_input)
        if step.form:
            self._into_low(maps, step, g, weights.low)
        return gradient

    def _through_strided(self, maps: Maps, step: Step, g: Tensor) -> None:
        """Through the first convolution of a node, where strides and taps differ between axes."""
        name, level = f"nodes.{step.node.name}.conv1.weight", step.node.level
        layer = Strided(self.parameters[name], self.plan.topology.stride(level))
        gx, gw = layer.backward(g, read(self.ops, *maps.prefix(step), self.plan.slope))
        self._add(name, gw.to(naive.accumulator(self.dtype)))
        target = self._gradient(maps, level - 1, Slot(0, step.prefix))
        target.add_(gx) if self._claim(maps, level - 1, [0]) else target.copy_(gx)

    def _through_gate(self, gate: Gate, g: Tensor, x: Tensor) -> Tensor:
        """The gradient of what a gate scales."""
        gx, found = gate.backward(g, x)
        for name, gradient in found.items():
            self._add(name, gradient)
        return gx

    def _into_gated(self, maps: Maps, step: Step, g: Tensor, weight: Tensor, gate: Gate, x: Tensor) -> None:
        """Into the prefix and the low source of a node whose input `x` is gated."""
        g_x = torch.empty_like(x)
        self.ops.conv(g_x, g, self._cast(weight), axes=self.plan.axes)
        of_prefix, of_low = self._through_gate(gate, g_x, x).split([step.prefix, x.shape[-1] - step.prefix], dim=-1)
        if step.prefix:
            target = self._gradient(maps, step.node.level, Slot(0, step.prefix))
            add = self._claim(maps, step.node.level, step.node.prefix)
            target.add_(of_prefix) if add else target.copy_(of_prefix)
        self._into_upsampled(maps, step, of_low)

    def _first_parameters(self, maps: Maps, step: Step, g: Tensor, total: Tensor | None, operand: tuple) -> None:
        """The gradients of a node's first convolution and of its up-sampling, through the composition; `operand`: the first
        one, and how to read it."""
        plan, name = self.plan, f"nodes.{step.node.name}"
        (a, affine_a), ops, axes = operand, of_step(self.ops, step), 2 if step.flat else plan.axes
        wa = g.new_zeros((3**axes, 0, g.shape[-1]), dtype=naive.accumulator(self.dtype))
        if step.source == "stride":
            phases = ops.conv_wgrad(g, read(self.ops, a, affine_a, plan.slope), axes=axes, phased=True)
            wa = weight_composition.strided_weight_gradient(phases, axes)
        elif step.source != "low":
            plain = maps.plain(step)
            wa = ops.conv_wgrad(a, g, axes=axes, affine=affine_a, slope=plan.slope, plain=plain)[0]
        wb = border = None
        up, up_bias = up_parameters(plan, step, self.parameters)
        if step.form == "phases":
            b, affine_b = maps.low(step)
            wb = self.ops.conv_wgrad(b, g, axes=plan.axes, phased=True, affine=affine_b, slope=plan.slope)
            border = None if up_bias is None else self.ops.border_sums(g, plan.axes)
        elif step.form == "full":
            low = upsampling(plan, step, self.parameters, maps).forward(*maps.low(step))
            wb = ops.conv_wgrad(low, g, axes=axes)
        self._add_bias(f"{name}.conv1.bias", total)
        if self.composed:
            named = {"prefix": wa, "low": wb, "border": border}
            self.parts |= {f"{step.node.name} {part}": value for part, value in named.items() if value is not None}
            return
        weight = self.parameters[f"{name}.conv1.weight"]
        parts = [None if part is None else part.to(weight.dtype) for part in (wa, wb, None, border)]
        g_weight, g_up, g_up_bias = weight_composition.first_operands_backward(
            weight_composition.Operands(*parts), weight, prefix_width(step, weight), step.form, up, up_bias
        )
        self._add(f"{name}.conv1.weight", g_weight)
        if up is not None and plan.project:
            self._add(f"{name}.up.project.weight", g_up.transpose(0, 1))
            self._add(f"{name}.up.project.bias", g_up_bias)
        elif up is not None:
            self._add(f"{name}.up.weight", g_up)
            self._add(f"{name}.up.bias", g_up_bias)

    def _add_bias(self, name: str, total: Tensor | None) -> None:
        """Adds the gradient of a convolution's bias, if it has one; None stands for zero."""
        if name in self.parameters:
            self._add(name, self.zeros[: self.parameters[name].shape[0]] if total is None else total)

    def _through_norm(self, name: str, g: Tensor, x: Tensor, table: Tensor | None, slot: Slot) -> Tensor | None:
        """Turns g, in place, from the gradient of an activated map into that of the convolution's output x.

        Returns the gradient of the convolution's bias, the sum over the pixels; None before a norm that subtracts the
        mean, where it is zero but for rounding.
        """
        mode = self.modes.get(name)
        if mode is None:
            return self.ops.act_backward(g, x, self.plan.slope)
        rows = table[:, :, slot.offset : slot.end]
        mean, inverse, scale, shift = rows.unbind()
        averages = partial(averages_of, group=self.group) if mode == "batch" and self.group is not None else None
        gw, gb = self.ops.norm_backward(
            g, x, mean, inverse, (scale, shift), self.plan.slope, mode == "frozen", averages=averages
        )
        self._add(f"nodes.{name}.weight", gw)
        self._add(f"nodes.{name}.bias", gb)
        return gb * scale[0] if mode == "frozen" else None

    def _into_prefix(self, maps: Maps, step: Step, g: Tensor, weight: Tensor, needs_input: bool) -> Tensor | None:
        plan, node, ops, axes = self.plan, step.node, of_step(self.ops, step), 2 if step.flat else self.plan.axes
        if step.source == "prefix":
            target = self._gradient(maps, node.level, Slot(0, step.prefix))
            add = self._claim(maps, node.level, node.prefix)
            ops.conv(target, g, self._cast(weight), axes=axes, add=add)
            return None
        if step.source == "low" or (step.source == "input" and not needs_input):
            return None
        if step.source == "stride":
            target = self._gradient(maps, node.level - 1, Slot(0, step.prefix))
            ops.conv(
                target, view(target, Slot(0, 0)), self._cast(weight.new_empty(3**axes, 0, step.prefix)), axes=axes,
                stride=2, phased=True, b=g, wb=self._cast(weight_composition.strided_gradient(weight, axes)),
                add=self._claim(maps, node.level - 1, [0]),
            )  # fmt: skip
            return None
        a, _ = maps.prefix(step)
        ga = torch.empty_like(a)
        ops.conv(ga, g, self._cast(weight), axes=axes)
        if step.source == "input":
            return from_maps(ga, plan.axes)
        above = next(other for other in plan.steps if other.node.position == (node.level - 1, 0))
        x, affine_x = maps.out(above)
        target, add = self._gradient(maps, node.level - 1, above.out), self._claim(maps, node.level - 1, [0])
        pool, axes = of_pool(self.ops, plan, step)
        pooled = even(x, axes)
        part = target if pooled is x else torch.empty_like(pooled)
        pool.pool_backward(part, ga, pooled, axes=axes, affine=affine_x, slope=plan.slope, add=add and part is target)
        if part is not target:  # the last pixel of an odd axis has no gradient
            target = target if add else target.zero_()
            target[tuple(map(slice, part.shape))] += part
        return None

    def _into_low(self, maps: Maps, step: Step, g: Tensor, weight: Tensor) -> None:
        plan, (level, column) = self.plan, step.node.low
        if step.form == "phases":
            add = self._claim(maps, level, [column])
            target = self._gradient(maps, level, step.low)
            self.ops.conv(target, g, self._cast(weight), axes=plan.axes, taps=4, stride=2, add=add)
            return
        g_up = g.new_empty((*g.shape[:4], step.node.up_width))
        of_step(self.ops, step).conv(g_up, g, self._cast(weight), axes=plan.axes)
        self._into_upsampled(maps, step, g_up)

    def _into_upsampled(self, maps: Maps, step: Step, g_up: Tensor) -> None:
        """From the gradient of the up-sampled low source of a node to that of the low source and of the up-sampling."""
        plan, (level, column) = self.plan, step.node.low
        add = self._claim(maps, level, [column])
        target = self._gradient(maps, level, step.low)
        of_node = upsampling(plan, step, self.parameters, maps)
        gx, found = of_node.backward(from_maps(g_up, plan.axes), *maps.low(step))
        for name, gradient in found.items():
            self._add(name, gradient)
        target.add_(gx) if add else target.copy_(gx)

    def _cast(self, weight: Tensor) -> Tensor:
        return cast(weight, self.dtype, not takes_views(self.ops))
