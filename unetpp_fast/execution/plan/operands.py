"""The weights of each node's convolutions in the form that the ops take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import naive
from . import weight_composition
from .steps import Plan, Step
from .weight_composition import Operands

Modes = Mapping[str, str]


def cast(weight: Tensor, dtype: torch.dtype, contiguous: bool = True) -> Tensor:
    """A weight rounded to `dtype`, in at most one copy; of any strides, and perhaps a view, unless `contiguous`."""
    return weight.to(dtype, memory_format=torch.contiguous_format).contiguous() if contiguous else weight.to(dtype)


def up_parameters(plan: Plan, step: Step, parameters: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Weight (for `weight_composition.phase_weights`) and bias of a node's up-sampling by phases; None if it has none."""
    name = f"nodes.{step.node.name}.up"
    if step.form == "phases" and plan.upsample == "deconv":
        return parameters[f"{name}.weight"], parameters.get(f"{name}.bias")
    if step.form == "phases" and plan.project:
        return parameters[f"{name}.project.weight"].transpose(0, 1), parameters[f"{name}.project.bias"]
    return None, None


def conv1_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> Operands:
    """The operands of a node's first convolution."""
    weight, bias = _folded(plan, f"{step.node.name}.norm1", f"nodes.{step.node.name}.conv1", parameters, modes)
    return weight_composition.first_operands(
        weight, bias, prefix_width(step, weight), step.form, *up_parameters(plan, step, parameters)
    )


def prefix_width(step: Step, weight: Tensor) -> int:
    """Channels of the first operand of a node's first convolution."""
    return weight.shape[1] if step.source in ("input", "pool", "stride", "unlike", "gated") else step.prefix


def conv2_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> Operands:
    """The operands of a node's second convolution."""
    name = f"{step.node.name}.norm2"
    weight, bias = _folded(plan, name, f"nodes.{step.node.name}.conv2", parameters, modes)
    return Operands(weight_composition.taps_first(weight), bias=bias)


def node_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> tuple[Operands, Operands]:
    """The operands of both convolutions of a node."""
    return conv1_operands(plan, step, parameters, modes), conv2_operands(plan, step, parameters, modes)


@dataclass(frozen=True)
class GradientOperands:
    """The weights of a node's data gradients: into the prefix `[3^axes, CO, KA]`, into the low source (`[4^axes, CO, KB]` by
    phases, `[3^axes, CO, KB]` at full resolution) and through the second convolution `[3^axes, CO, CO]`."""

    prefix: Tensor
    low: Tensor | None
    second: Tensor


def gradient_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor]) -> GradientOperands:
    """The weights of a node's data gradients, of any strides."""
    weight, second = (parameters[f"nodes.{step.node.name}.conv{place}.weight"] for place in (1, 2))
    up, _ = up_parameters(plan, step, parameters)
    first = weight_composition.first_operands(weight, None, prefix_width(step, weight), step.form, up)
    low = None
    if step.form:
        phased = step.form == "phases"
        low = weight_composition.gathered(first.wb, plan.axes) if phased else weight_composition.flipped(first.wb[0])
    flipped = weight_composition.flipped
    return GradientOperands(flipped(first.wa), low, flipped(weight_composition.taps_first(second)))


def all_operands(
    plan: Plan, parameters: Mapping[str, Tensor], modes: Modes, dtype: torch.dtype
) -> dict[str, tuple[Operands, Operands]]:
    """`Forward.operands`: composed in float64, then rounded. On a CPU, weights that need neither are views of parameters."""
    acc = naive.accumulator(dtype)
    contiguous = any(value.device.type != "cpu" for value in parameters.values())

    def rounded(exact: Operands, plain: Tensor | None) -> Operands:
        wa = exact.wa if plain is None else plain
        parts = zip((wa, *exact.tensors()[1:]), (dtype, dtype, acc, acc), strict=True)
        return Operands(*(None if value is None else cast(value, kind, contiguous) for value, kind in parts))

    def both(step: Step) -> tuple[Operands, Operands]:
        node = step.node.name
        mine = {name: value for name, value in parameters.items() if name.startswith(f"nodes.{node}.")}
        wide = {name: value.double() if value.is_floating_point() else value for name, value in mine.items()}
        plain: list[Tensor | None] = []
        for place in ("1", "2"):
            weight = mine[f"nodes.{node}.conv{place}.weight"]
            width = prefix_width(step, weight) if place == "1" else weight.shape[1]
            is_folded = modes.get(f"{node}.norm{place}") == "folded"
            plain.append(None if is_folded else weight_composition.taps_first(weight[:, :width]))
        first, second = map(rounded, node_operands(plan, step, wide, modes), plain)
        return first, second

    return {step.node.name: both(step) for step in plan.computed}


def _folded(
    plan: Plan, norm: str, conv: str, parameters: Mapping[str, Tensor], modes: Modes
) -> tuple[Tensor, Tensor | None]:
    weight, bias = parameters[f"{conv}.weight"], parameters.get(f"{conv}.bias")
    if modes.get(norm) != "folded":
        return weight, bias
    keys = ("weight", "bias", "running_mean", "running_var")
    wide = torch.promote_types(weight.dtype, torch.float32)
    parts = tuple(parameters[f"nodes.{norm}.{key}"].to(wide) for key in keys)
    return weight_composition.fold(weight.to(wide), None if bias is None else bias.to(wide), parts, plan.eps)
