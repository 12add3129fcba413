"""A network's weights as the CPU backend takes them: batch norms folded in, up-sampling composed, laid out for oneDNN."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..call import Call
from ..plan import operands, steps, weight_composition
from ..plan.steps import Plan, Step
from . import convolutions

Region = tuple[int, tuple[slice, ...], Tensor]


@dataclass(frozen=True)
class NodeWeights:
    """What a node computes with, in the maps' precision unless said otherwise.

    first: a 3x3 weight for each full-size operand of the first convolution: the maps of the prefix, or the image or
    pooled map, then the up-sampled map where it is made. low: the transposed 4x4 weight of the low source, by phases.
    border: what a transposed convolution's bias lacks at the borders: for a region, whether it is the first row, those
    between or the last (0, 1, 2), where it is on the other axes, and `[1, CO, 1..]`.
    project: `[K, C]` and `[C]`, a 1x1 convolution before linear up-sampling. norms: scale and shift `[CO]` of each
    instance norm, in float32.
    """

    first: tuple[Tensor, ...]
    first_bias: Tensor | None
    low: Tensor | None
    border: tuple[Region, ...]
    project: tuple[Tensor, Tensor] | None
    second: Tensor
    second_bias: Tensor | None
    norms: tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True)
class Weights:
    """Of all nodes, by name, and of the heads, by column: `[classes, K]` and `[classes, 1]`."""

    nodes: Mapping[str, NodeWeights]
    heads: Mapping[int, tuple[Tensor, Tensor]]
    dtype: torch.dtype


def pack(plan: Plan, parameters: Mapping[str, Tensor], dtype: torch.dtype) -> Weights:
    """Folds and composes parameters and buffers (by their names in a network) in float64, then rounds once to `dtype`."""
    with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        wide = {name: value.detach().double() for name, value in parameters.items() if value.is_floating_point()}
        modes = {}
        if plan.norm:
            mode = "instance" if plan.norm == "instance" else "folded"
            modes = {f"{step.node.name}.norm{k}": mode for step in plan.steps for k in (1, 2)}
        nodes = {step.node.name: _node(plan, step, wide, modes, dtype) for step in plan.steps}
        heads = {}
        for column in plan.topology.heads:
            name = f"heads.{steps.head_step(plan, column).node.name}"
            weight, bias = wide[f"{name}.weight"].flatten(1), wide[f"{name}.bias"][:, None]
            heads[column] = (weight.to(dtype), bias.to(dtype))
    return Weights(nodes, heads, dtype)


def _node(plan: Plan, step: Step, wide: Mapping[str, Tensor], modes: Mapping[str, str], dtype: torch.dtype) -> NodeWeights:
    name, axes = step.node.name, plan.axes
    first = operands.conv1_operands(plan, step, wide, modes)
    widths = [plan.topology[step.node.level, column].width for column in step.node.prefix] or [first.wa.shape[1]]
    kernels = list(weight_composition.taps_last(first.wa, axes).split(widths, dim=1))
    if step.form == "full":
        kernels.append(weight_composition.taps_last(first.wb[0], axes))
    low, bias, border = None, first.bias, ()
    if step.form == "phases":
        low = weight_composition.gathered(first.wb, axes).unflatten(0, [4] * axes)  # [4.., CO, K]
        low = convolutions.pack_up(low.permute(-1, -2, *range(axes)).to(dtype))
        if first.border is not None:
            inner = first.border[3**axes // 2]
            bias = inner if bias is None else bias + inner
            border = tuple(_regions(first.border - inner, axes, dtype))
    project = None
    if step.form == "full" and plan.project:
        weight, shift = (wide[f"nodes.{name}.up.project.{key}"] for key in ("weight", "bias"))
        project = (weight.flatten(1).T.contiguous().to(dtype), shift.to(dtype))
    second = operands.conv2_operands(plan, step, wide, modes)
    norms = ()
    if plan.norm == "instance":
        norms = tuple(
            (wide[f"nodes.{name}.norm{k}.weight"].float(), wide[f"nodes.{name}.norm{k}.bias"].float()) for k in (1, 2)
        )
    return NodeWeights(
        tuple(convolutions.pack_conv(kernel.to(dtype)) for kernel in kernels), _cast(bias, dtype), low, border, project,
        convolutions.pack_conv(weight_composition.taps_last(second.wa, axes).to(dtype)), _cast(second.bias, dtype), norms,
    )  # fmt: skip


def _cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def _regions(table: Tensor, axes: int, dtype: torch.dtype) -> Iterator[Region]:
    """The border classes of a map but the inner one, from the rows of `[3^axes, CO]`."""
    spans = (slice(0, 1), slice(1, -1), slice(-1, None))
    for row, places in zip(table, itertools.product(range(3), repeat=axes), strict=True):
        if set(places) != {1}:
            yield places[0], tuple(spans[place] for place in places[1:]), row.to(dtype).view(1, -1, *[1] * axes)


@dataclass(frozen=True)
class _Kept:
    """Packed weights, and a copy of the values they were packed from."""

    values: dict[str, Tensor]
    weights: Weights

    def are_of(self, tensors: Mapping[str, Tensor]) -> bool:
        return self.values.keys() == tensors.keys() and all(
            value.dtype == tensors[name].dtype and torch.equal(value, tensors[name]) for name, value in self.values.items()
        )


_kept: dict[tuple, _Kept] = {}
_lock = threading.Lock()


def of_network(call: Call) -> Weights:
    """The packed weights of a network as they are now, packed anew only when they changed.

    Every call compares all values with those that were packed: no version counter tells of an edit through `.data` or of
    one by another library, and reading the weights takes little beside a pass.
    """
    tensors, structure = call.tensors(), call.network.structure
    first = call.network.nodes["x0_0"].conv1.weight  # shared by a network and its pruned forms
    key = (id(first), structure.handle, call.dtype)
    with torch.inference_mode(False), torch.no_grad(), _lock:
        found = _kept.get(key)
        if found is None or not found.are_of(tensors):
            if found is None:
                weakref.finalize(first, _kept.pop, key, None)
            copies = {name: value.clone() for name, value in tensors.items()}
            found = _kept[key] = _Kept(copies, pack(structure.plan, copies, call.dtype))
    return found.weights
