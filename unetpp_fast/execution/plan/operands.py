"""The weights of each node's convolutions in the form that the ops take."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels import naive
from . import weight_composition
from .steps import Plan, Step
from .weight_composition import Operands

Modes = Mapping[str, str]


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight rounded to `dtype` and contiguous, in at most one copy."""
    return weight.to(dtype, memory_format=torch.contiguous_format).contiguous()


def upsampling(plan: Plan, step: Step, parameters: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Weight (for `weight_composition.phase_weights`) and bias of a node's up-sampling by phases; None if it has none."""
    name = f"nodes.{step.node.name}.up"
    if step.form == "phases" and plan.upsample == "deconv":
        return parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if step.form == "phases" and plan.project:
        return parameters[f"{name}.project.weight"].transpose(0, 1), parameters[f"{name}.project.bias"]
    return None, None


def conv1_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> Operands:
    """The operands of a node's first convolution."""
    weight, bias = _folded(plan, f"{step.node.name}.norm1", f"nodes.{step.node.name}.conv1", parameters, modes)
    return weight_composition.first_operands(
        weight, bias, prefix_width(step, weight), step.form, *upsampling(plan, step, parameters)
    )


def prefix_width(step: Step, weight: Tensor) -> int:
    """Input channels of a node's first convolution that do not come from the level below."""
    return step.prefix if step.source == "prefix" else weight.shape[1]


def conv2_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> Operands:
    """The operands of a node's second convolution."""
    name = f"{step.node.name}.norm2"
    weight, bias = _folded(plan, name, f"nodes.{step.node.name}.conv2", parameters, modes)
    return Operands(weight_composition.taps_first(weight), bias=bias)


def node_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> tuple[Operands, Operands]:
    """The operands of both convolutions of a node."""
    return conv1_operands(plan, step, parameters, modes), conv2_operands(plan, step, parameters, modes)


def all_operands(
    plan: Plan, parameters: Mapping[str, Tensor], modes: Modes, dtype: torch.dtype
) -> dict[str, tuple[Operands, Operands]]:
    """`Forward.operands`: composed in the parameters' precision, then rounded."""
    acc = naive.accumulator(dtype)

    def rounded(operands: Operands) -> Operands:
        parts = zip(operands.tensors(), (dtype, dtype, acc, acc), strict=True)
        return Operands(*(None if value is None else cast(value, kind) for value, kind in parts))

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
    return weight_composition.fold(weight.to(wide), None if bias is None else bias.to(wide), parts, plan.eps)
