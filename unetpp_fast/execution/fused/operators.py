"""A whole forward pass, and a whole backward pass, as one operator each.

`torch.ops.unetpp_fast.forward` takes the image, or the maps of an encoder, and every parameter and buffer of a network, and
returns its logits and what the backward pass needs; `torch.compile(fullgraph=True)` and autograd see one opaque call.
Neither operator writes to its inputs: new running statistics come back as results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...architecture.layers import InstanceNorm
from ...kernels import naive, scratch
from ..batch_statistics import group_of
from ..call import Call
from ..plan.steps import Slot
from . import structure as structures
from .backward import Backward
from .buffers import Maps, allocate, full_size, to_maps, view
from .composed import Composed, Composition, composition
from .forward import Forward, moment_places
from .ops import composes, load_ops
from .structure import Structure


class Settings(NamedTuple):
    """How a pass is computed, as both operators take it.

    handle: of the structure. training: "1" for each norm in training mode, "0" for the others. dtype: of the maps.
    ops: for `load_ops`. group: the name of the process group over which statistics are taken, "" for none.
    recompute: the backward pass recomputes the outputs of first convolutions; they are not kept.
    """

    handle: str
    training: str
    dtype: torch.dtype
    ops: str
    group: str
    recompute: bool


@dataclass
class Results:
    """What the forward operator returns, in this order: the logits of each head; the tensors that the backward pass needs
    (`Maps.kept`, and of ops that compose weights by a kernel `Composition.compose`); `Forward.moments`, if there are any."""

    logits: list[Tensor]
    kept: list[Tensor]
    moments: Tensor | None

    def flat(self) -> list[Tensor]:
        return [*self.logits, *self.kept, *([] if self.moments is None else [self.moments])]

    @classmethod
    def of(cls, tensors: Sequence[Tensor], structure: Structure, modes: dict[str, str]) -> Results:
        """The inverse of `flat`."""
        heads, any_moments = len(structure.plan.topology.heads), "batch" in modes.values()
        end = len(tensors) - any_moments
        return cls(list(tensors[:heads]), list(tensors[heads:end]), tensors[-1] if any_moments else None)


def _named(structure: Structure, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers by name, at least in float32: weights are composed before they are rounded."""
    names = structure.parameters + structure.buffers
    wide = [tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor for tensor in tensors]
    return dict(zip(names[: len(tensors)], wide, strict=True))


@torch.library.custom_op("unetpp_fast::forward", mutates_args=())
def forward_op(
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    keep: bool,
    handle: str,
    training: str,
    dtype: torch.dtype,
    ops: str,
    group: str,
    recompute: bool,
) -> list[Tensor]:
    """`Results.flat()` for the inputs (`Plan.inputs`) and all parameters and buffers; `kept` is empty without `keep`."""
    structure = structures.find(handle)
    modes = structure.modes(training, keep)
    named = _named(structure, tensors)
    run = Forward(structure.plan, load_ops(ops), modes, named, dtype, group_of(group))
    weights: list[Tensor | None] = []
    with (
        scratch.reused(),
        torch.autocast(inputs[0].device.type, enabled=False),
    ):  # precisions are chosen here; sums and weights stay wide
        if composes(ops):
            of_all = composition(structure, named)
            scales, given = of_all.folded(named) if "folded" in modes.values() else (None, named)
            weights = of_all.compose(named, dtype, scales, keep)
            run.operands = Composed(of_all, weights, given).operands
        logits, maps = run.run(inputs, keep, recompute)
    kept = [*maps.kept(structure.plan, recompute), *(weights if recompute else weights[:1])] if keep else []
    return Results([_unshared(head) for head in logits], kept, run.moments).flat()


@forward_op.register_fake
def _(inputs, tensors, keep, handle, training, dtype, ops, group, recompute):
    structure = structures.find(handle)
    structures.keep(structure)
    plan, modes = structure.plan, structure.modes(training, keep)
    x = inputs[0]
    shape = x.shape[0], structure.out_channels, *full_size(plan, inputs)
    logits = [x.new_empty(shape, dtype=dtype) for _ in plan.topology.heads]
    kept = []
    if keep:
        maps = allocate(plan, inputs, dtype, keep=True, raw=bool(modes), recompute=recompute)
        for step in plan.steps:
            level = maps.levels[step.node.level]
            if step.source == "pool":
                width = plan.topology[step.node.level - 1, 0].width
                maps.pools[step.node.level] = level.new_empty((*level.shape[:4], width))
        kept = maps.kept(plan, recompute)
        if composes(ops):
            weights = composition(structure, _named(structure, tensors)).results(x, dtype)
            kept += weights if recompute else weights[:1]
    places = moment_places(plan, modes).values()
    moments = x.new_empty((2, max(slot.end for slot in places)), dtype=naive.accumulator(dtype)) if places else None
    return Results(logits, kept, moments).flat()


def _unshared(x: Tensor) -> Tensor:
    """`x` in memory of its own, as the results of an operator must be."""
    unshared = x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
    return x if unshared else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("unetpp_fast::backward", mutates_args=())
def backward_op(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor],
    heads: Sequence[bool],
    needs_input: bool,
    handle: str,
    training: str,
    dtype: torch.dtype,
    ops: str,
    group: str,
    recompute: bool,
) -> list[Tensor]:
    """The gradients of the parameters that these heads reach, then those of the inputs if they are needed.

    Of ops that compose weights by a kernel: in float32, those of `Composition.weights` and those of the other parameters,
    each one after another in a flat tensor.
    """
    structure = structures.find(handle)
    plan, modes = structure.plan, structure.modes(training, True)
    image = None if plan.topology.given else to_maps(inputs[0], plan.axes).to(dtype).contiguous()
    named, composed = _named(structure, parameters), None
    if composes(ops):
        count = 3 if recompute else 1
        composed, kept = Composed(composition(structure, named), kept[-count:], named), kept[:-count]
    maps = Maps.from_kept(plan, image, kept, bool(modes), recompute)
    given = iter(gradients)
    run = Backward(plan, load_ops(ops), modes, named, dtype, group_of(group), recompute, composed)
    with scratch.reused(), torch.autocast(inputs[0].device.type, enabled=False):
        found = run.run(maps, [next(given) if present else None for present in heads], needs_input)
        of_inputs = [torch.empty_like(x).copy_(gradient) for x, gradient in zip(inputs, found, strict=False)]
        if composed:
            reached = composition(structure, named, heads)
            others = [run.gradients[name] for name in _not_composed(structure, reached, heads)]
            flat = [reached.gradients_of(named, run.parts), torch._C._nn.flatten_dense_tensors(others).float()]
            return flat + of_inputs
    dtypes = {name: tensor.dtype for name, tensor in zip(structure.parameters, parameters, strict=True)}
    of_parameters = [_unshared(run.gradients[name].to(dtypes[name])) for name in structure.parameters_of(heads)]
    return of_parameters + of_inputs


@backward_op.register_fake
def _(inputs, parameters, kept, gradients, heads, needs_input, handle, training, dtype, ops, group, recompute):
    structure = structures.find(handle)
    structures.keep(structure)
    named = dict(zip(structure.parameters, parameters, strict=True))
    of_inputs = [torch.empty_like(x) for x in inputs] if needs_input else []
    if composes(ops):
        reached = composition(structure, named, heads)
        sizes = sum(named[name].numel() for name in _not_composed(structure, reached, heads)), reached.parameters.size
        return [inputs[0].new_empty(size, dtype=torch.float32) for size in reversed(sizes)] + of_inputs
    like = [named[name] for name in structure.parameters_of(heads)]
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in like] + of_inputs


def _not_composed(structure: Structure, reached: Composition, heads: Sequence[bool]) -> list[str]:
    return [name for name in structure.parameters_of(heads) if name not in reached.parameters.of]


def _by_name(
    structure: Structure, parameters: Mapping[str, Tensor], heads: Sequence[bool], flat: Sequence[Tensor]
) -> dict[str, Tensor]:
    """The gradients of parameters, from what `backward_op` returns for ops that compose weights by a kernel."""
    reached = composition(structure, parameters, heads)
    named = {name: reached.parameters.view(flat[0], name) for name in reached.weights}
    others = _not_composed(structure, reached, heads)
    parts = flat[1].split([parameters[name].numel() for name in others])
    named |= {name: part.view(parameters[name].shape) for name, part in zip(others, parts, strict=True)}
    return {name: gradient.to(parameters[name].dtype) for name, gradient in named.items()}


def _setup_context(ctx, inputs, output) -> None:
    images, tensors, _, *settings = inputs
    ctx.settings = Settings(*settings)
    ctx.structure = structure = structures.find(ctx.settings.handle)  # the network may be gone before the backward pass
    results = Results.of(output, structure, structure.modes(ctx.settings.training, True))
    ctx.count = len(structure.parameters)  # buffers are not saved: running statistics change before the backward pass
    ctx.set_materialize_grads(False)
    ctx.inputs = len(images)
    ctx.save_for_backward(*images, *tensors[: ctx.count], *results.kept)


def _backward(ctx, gradients):
    structure: Structure = ctx.structure
    inputs, saved = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
    of_logits = gradients[: len(structure.plan.topology.heads)]
    heads = [gradient is not None for gradient in of_logits]
    given = [gradient for gradient in of_logits if gradient is not None]
    needs_input = any(ctx.needs_input_grad[0])
    results = torch.ops.unetpp_fast.backward(
        inputs, saved[: ctx.count], saved[ctx.count :], given, heads, needs_input, *ctx.settings
    )
    if composes(ctx.settings.ops):
        parameters = dict(zip(structure.parameters, saved[: ctx.count], strict=True))
        named = _by_name(structure, parameters, heads, results)
    else:
        named = dict(zip(structure.parameters_of(heads), results, strict=False))
    of_tensors = [named.get(name) for name in structure.parameters + structure.buffers]
    of_inputs = list(results[-ctx.inputs :]) if needs_input else [None] * ctx.inputs
    return of_inputs, of_tensors, None, *[None] * len(ctx.settings)


forward_op.register_autograd(_backward, setup_context=_setup_context)


def forward(call: Call, ops: str) -> list[Tensor]:
    """Logits of each head, computed with the ops called `ops`; updates running statistics as the reference does."""
    network, structure = call.network, call.structure
    norms = [module for module in call.modules if isinstance(module, structures.NORMS)]
    training = "".join("1" if module.training else "0" for module in norms)
    keep, group = call.needs_gradients, network.sync_group if "1" in training else ""
    settings = Settings(structure.handle, training, call.dtype, ops, group, keep and network.recompute)
    tensors = torch.ops.unetpp_fast.forward(call.inputs, [*call.parameters, *call.buffers], keep, *settings)
    results = Results.of(tensors, structure, structure.modes(training, keep))
    batch = [module for module in norms if module.training and not isinstance(module, InstanceNorm)]
    if batch:
        places = moment_places(structure.plan, structure.modes(training, keep))
        slots = [places[name] for name in structure.norms if name in places]
        _update(batch, results.moments, slots, call.x.shape[0] > 0 or bool(group))
    return results.logits


@torch.no_grad()
def _update(norms: Sequence[nn.Module], moments: Tensor, slots: Sequence[Slot], any_image: bool) -> None:
    """Updates running statistics with the norm's momentum, or as the mean over all batches if that is None.

    moments, slots: `Forward.moments`, and the place of each norm there.
    """
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    if not any_image:
        return
    for momentum in {norm.momentum for norm in norms}:
        mine = [index for index, norm in enumerate(norms) if norm.momentum == momentum]
        for key, row in (("running_mean", 0), ("running_var", 1)):
            running = [getattr(norms[index], key) for index in mine]
            parts = (view(moments[row], slots[index]) for index in mine)
            batch = [part.to(old.dtype) for part, old in zip(parts, running, strict=True)]
            if momentum is None:
                for index, old, new in zip(mine, running, batch, strict=True):
                    old.lerp_(new, norms[index].num_batches_tracked.to(old.dtype).reciprocal())
            else:
                torch._foreach_lerp_(running, batch, momentum)
