"""The weights of each node's convolutions in the form in which the ops take them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...kernels import naive
from . import weight_composition
from .steps import Plan, Step

Modes = Mapping[str, str]


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight as the ops take it, rounded and laid out in one copy where both are needed."""
    return weight.to(dtype, memory_format=torch.contiguous_format).contiguous()


def upsampling(plan: Plan, step: Step, parameters: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """Weight (as `compose.phase_weights` takes it) and bias of a node's up-sampling by phases, None where it has none."""
    name = f"nodes.{step.node.name}.up"
    if step.form == "phases" and plan.upsample == "deconv":
        return parameters[f"{name}.weight"], parameters[f"{name}.bias"]
    if step.form == "phases" and plan.project:
        return parameters[f"{name}.project.weight"].transpose(0, 1), parameters[f"{name}.project.bias"]
    return None, None


def first_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> weight_composition.Operands:
    """Weights of a node's first convolution in the engine's form."""
    weight, bias = _folded(plan, f"{step.node.name}.norm1", f"nodes.{step.node.name}.conv1", parameters, modes)
    return weight_composition.first_operands(
        weight, bias, prefix_width(step, weight), step.form, *upsampling(plan, step, parameters)
    )


def prefix_width(step: Step, weight: Tensor) -> int:
    """Input channels of a node's first convolution that do not come from below."""
    return step.prefix if step.source == "prefix" else weight.shape[1]


def second_operands(plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes) -> weight_composition.Operands:
    """As `first_operands`, of the second convolution."""
    name = f"{step.node.name}.norm2"
    weight, bias = _folded(plan, name, f"nodes.{step.node.name}.conv2", parameters, modes)
    return weight_composition.Operands(weight_composition.taps_first(weight), bias=bias)


def node_operands(
    plan: Plan, step: Step, parameters: Mapping[str, Tensor], modes: Modes
) -> tuple[weight_composition.Operands, weight_composition.Operands]:
    """Of both convolutions of a node."""
    return first_operands(plan, step, parameters, modes), second_operands(plan, step, parameters, modes)


def all_operands(
    plan: Plan, parameters: Mapping[str, Tensor], modes: Modes, dtype: torch.dtype
) -> dict[str, tuple[weight_composition.Operands, weight_composition.Operands]]:
    """`Forward.operands`: composed in the parameters' precision and rounded as the ops take them."""
    acc = naive.accumulator(dtype)

    def rounded(found: weight_composition.Operands) -> weight_composition.Operands:
        parts = zip(found.tensors(), (dtype, dtype, acc, acc), strict=True)
        return weight_composition.Operands(*(None if value is None else cast(value, kind) for value, kind in parts))

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
