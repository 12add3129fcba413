"""A whole forward pass, and a whole backward pass, as one operator each.

`torch.ops.unetpp_fast.forward` takes the input and every parameter and buffer of a network, and returns its logits and
what the backward pass needs; `torch.compile(fullgraph=True)` and autograd see one opaque call. Neither operator writes
to its inputs: new running statistics come back as results.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import engine, engine_backward
from .distributed import SyncedBatchNorm2d, SyncedBatchNorm3d, group_of
from .kernels import naive
from .layers import InstanceNorm, Interpolate, NodeModule
from .plan import Plan, make_plan, unsupported

if TYPE_CHECKING:
    from .models import Network

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Triton's interpreter, on the CPU
_MODULES = {"naive": "naive", "triton": "triton_ops", "cuda": "cuda_ops"}
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, InstanceNorm)
_LAYERS = {
    *NORMS, SyncedBatchNorm2d, SyncedBatchNorm3d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    Interpolate, NodeModule, nn.ModuleDict, nn.Identity, nn.Dropout, nn.ReLU, nn.LeakyReLU,
}  # fmt: skip
_SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps",
    "negative_slope", "mode", "align_corners",
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """What an operator knows of a network besides its tensors: the plan and the names, in the order they are passed."""

    plan: Plan
    out_channels: int
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    norms: tuple[str, ...]
    layers: list[tuple] | None
    key: str


_entries: list[Entry] = []


def load_ops(name: str) -> ModuleType:
    """The module with the ops: "naive" (plain PyTorch, any device), "triton" or "cuda" (see `backends.can_run_cuda`)."""
    return importlib.import_module(f"{__package__}.kernels.{_MODULES[name]}")


def register(network: Network) -> int | None:
    """A number that stands for the structure of `network` in this process; equal structures share one.

    None where the engine cannot run it: no plan (`plan.unsupported` says why), or outputs whose sign does not tell the
    input's.
    """
    if unsupported(network.topology, network.options):
        return None
    plan = make_plan(network.topology, network.options)
    if plan.norm is None and plan.slope < 0:  # its gradient is taken from the sign of what was stored
        return None
    entry = Entry(
        plan,
        network.out_channels,
        tuple(name for name, _ in network.named_parameters()),
        tuple(name for name, _ in network.named_buffers()),
        tuple(name for name, module in network.nodes.named_modules() if isinstance(module, NORMS)),
        _layers(network, plan),
        hashlib.sha256(f"{plan!r} {network.out_channels}".encode()).hexdigest()[:16],
    )
    if entry not in _entries:
        _entries.append(entry)
    return _entries.index(entry)


def _layers(network: Network, plan: Plan) -> list[tuple] | None:
    """What each layer computes: its type, settings and number of parameters; None where one does not fit the plan."""
    found = []
    for module in network.modules():
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        if module is network:
            continue
        if type(module) not in _LAYERS or any(hooks) or (isinstance(module, NORMS) and module.eps != plan.eps):
            return None
        count = sum(value is not None for value in module._parameters.values())
        found.append((type(module), count, *map(module.__dict__.get, _SETTINGS)))
    return found if all(head.out_channels == network.out_channels for head in network.heads.values()) else None


def is_as_registered(network: Network) -> bool:
    """Whether the layers of a registered network are still those that it was built with.

    Layers may be replaced, parametrised, hooked or, in a replica of `nn.DataParallel`, without parameters: then only
    calling them gives what they compute.
    """
    entry = _entries[network.handle]
    layers = _layers(network, entry.plan)
    return layers is not None and layers == entry.layers


def entry_of(network: Network) -> Entry:
    """What the operators know of a registered network."""
    return _entries[network.handle]


def plan_of(network: Network) -> Plan:
    """The plan that the operators run for a registered network."""
    return _entries[network.handle].plan


def key_of(network: Network) -> str:
    """A name for the structure of a registered network that is the same in every process."""
    return _entries[network.handle].key


def modes_of(entry: Entry, training: str, keep: bool) -> dict[str, str]:
    """How each norm of a pass gets its statistics; see `engine.Forward`.

    training: a "1" for each norm that is in training, a "0" for each other. Batch norms are folded into the weights
    only where no backward pass follows and none of them is in training.
    """
    if entry.plan.norm == "instance":
        return dict.fromkeys(entry.norms, "instance")
    still = "frozen" if keep or "1" in training else "folded"
    return {name: "batch" if mine == "1" else still for name, mine in zip(entry.norms, training, strict=True)}


def _pack(maps: engine.Maps, recompute: bool) -> list[Tensor]:
    """The tensors of the buffers in a fixed order, without the image and what is to be computed again."""
    tables = [table for table in (*maps.level_tables, *maps.mid_tables) if table is not None]
    mids = [] if recompute else maps.mids
    return [*maps.levels, *mids, *tables, *maps.pools.values(), *maps.ups.values()]


def _unpack(plan: Plan, image: Tensor, tensors: Sequence[Tensor], raw: bool, recompute: bool) -> engine.Maps:
    rest, count = iter(tensors), plan.topology.depth + 1
    levels, mids, level_tables, mid_tables = (
        [next(rest) if present else None for _ in range(count)] for present in (True, not recompute, raw, raw)
    )
    if recompute:
        mids = engine.shared_mids(plan, levels)
    pools = {step.node.level: next(rest) for step in plan.steps if step.source == "pool"}
    ups = {step.node.name: next(rest) for step in plan.steps if step.form == "full"}
    return engine.Maps(image, levels, mids, level_tables, mid_tables, pools, ups)


def _statistics_shapes(entry: Entry, modes: dict[str, str], like: Tensor) -> list[Tensor]:
    widths = {step.node.name: step.out.width for step in entry.plan.steps}
    return [like.new_empty(widths[name.split(".")[0]]) for name in _in_batch_mode(entry, modes) for _ in range(2)]


def _in_batch_mode(entry: Entry, modes: dict[str, str]) -> list[str]:
    return [name for name in entry.norms if modes.get(name) == "batch"]


def _named(entry: Entry, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Parameters and buffers by name, in float32 at least: weights are composed before they are rounded."""
    names = entry.parameters + entry.buffers
    wide = [tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize < 4 else tensor for tensor in tensors]
    return dict(zip(names[: len(tensors)], wide, strict=True))


@torch.library.custom_op("unetpp_fast::forward", mutates_args=())
def forward_op(
    x: Tensor,
    tensors: Sequence[Tensor],
    handle: int,
    training: str,
    dtype: torch.dtype,
    keep: bool,
    ops: str,
    group: str,
    recompute: bool,
) -> list[Tensor]:
    """Logits of each head; with `keep`, what `_pack` gives; mean and unbiased variance of each norm in training.

    group: the name of the process group over which statistics are taken, "" for none.
    recompute: the backward pass computes the outputs of first convolutions again; they are not kept.
    """
    entry = _entries[handle]
    modes = modes_of(entry, training, keep)
    named = _named(entry, tensors)
    run = engine.Forward(entry.plan, load_ops(ops), modes, named, dtype, group_of(group))
    with torch.autocast(x.device.type, enabled=False):  # precisions are chosen here, sums and weights kept wide
        logits, maps = run.run(x, keep, recompute)
    statistics = [value for name in _in_batch_mode(entry, modes) for value in run.statistics[name]]
    return [*logits, *(_pack(maps, recompute) if keep else []), *statistics]


@forward_op.register_fake
def _(x, tensors, handle, training, dtype, keep, ops, group, recompute):
    entry = _entries[handle]
    plan, modes = entry.plan, modes_of(entry, training, keep)
    logits = [x.new_empty((x.shape[0], entry.out_channels, *x.shape[2:]), dtype=dtype) for _ in plan.topology.heads]
    kept = []
    if keep:
        maps = engine.allocate(plan, x, dtype, not recompute, raw=bool(modes))
        for step in plan.steps:
            level = maps.levels[step.node.level]
            if step.source == "pool":
                width = plan.topology[step.node.level - 1, 0].width
                maps.pools[step.node.level] = level.new_empty((*level.shape[:4], width))
            if step.form == "full":
                maps.ups[step.node.name] = level.new_empty((*level.shape[:4], step.node.up_width))
        kept = _pack(maps, recompute)
    return [*logits, *kept, *_statistics_shapes(entry, modes, x.new_empty(0, dtype=naive.accumulator(dtype)))]


def _own(x: Tensor) -> Tensor:
    """`x` in memory of its own: the results of an operator may not share any."""
    return (
        x
        if x.is_contiguous() and x.untyped_storage().nbytes() == x.nbytes
        else x.clone(memory_format=torch.contiguous_format)
    )


def _reached(entry: Entry, heads: Sequence[bool]) -> list[str]:
    """Names of the parameters that gradients of these heads reach."""
    columns = [column for column, given in zip(entry.plan.topology.heads, heads, strict=True) if given]
    nodes = {node.name for column in columns for node in entry.plan.topology.pruned(column).nodes}
    ends = {entry.plan.topology[0, column].name for column in columns}
    return [
        name
        for name in entry.parameters
        if (name.startswith("nodes.") and name.split(".")[1] in nodes)
        or (name.startswith("heads.") and name.split(".")[1] in ends)
    ]


@torch.library.custom_op("unetpp_fast::backward", mutates_args=())
def backward_op(
    x: Tensor,
    parameters: Sequence[Tensor],
    kept: Sequence[Tensor],
    gradients: Sequence[Tensor],
    heads: Sequence[bool],
    handle: int,
    training: str,
    dtype: torch.dtype,
    needs_input: bool,
    ops: str,
    group: str,
    recompute: bool,
) -> list[Tensor]:
    """The gradients of the parameters that the given heads reach, then that of the input if it is needed."""
    entry = _entries[handle]
    modes = modes_of(entry, training, True)
    named = _named(entry, parameters)
    image = engine.to_maps(x, entry.plan.axes).to(dtype).contiguous()
    maps = _unpack(entry.plan, image, kept, bool(modes), recompute)
    given = iter(gradients)
    run = engine_backward.Backward(entry.plan, load_ops(ops), modes, named, dtype, group_of(group), recompute)
    with torch.autocast(x.device.type, enabled=False):
        of_input = run.run(maps, [next(given) if present else None for present in heads], needs_input)
    dtypes = {name: tensor.dtype for name, tensor in zip(entry.parameters, parameters, strict=True)}
    found = [_own(run.gradients[name].to(dtypes[name])) for name in _reached(entry, heads)]
    return [*found, of_input.to(x.dtype).contiguous()] if needs_input else found


@backward_op.register_fake
def _(x, parameters, kept, gradients, heads, handle, training, dtype, needs_input, ops, group, recompute):
    entry = _entries[handle]
    named = dict(zip(entry.parameters, parameters, strict=True))
    found = [torch.empty_like(named[name], memory_format=torch.contiguous_format) for name in _reached(entry, heads)]
    return [*found, torch.empty_like(x, memory_format=torch.contiguous_format)] if needs_input else found


def _setup_context(ctx, inputs, output) -> None:
    x, tensors, ctx.handle, ctx.training, ctx.dtype, _, ctx.ops, ctx.group, ctx.recompute = inputs
    entry = _entries[ctx.handle]
    ctx.heads = len(entry.plan.topology.heads)
    ctx.count = len(entry.parameters)  # buffers are not saved: running statistics change before the backward pass
    statistics = 2 * len(_in_batch_mode(entry, modes_of(entry, ctx.training, True)))
    kept = output[ctx.heads : len(output) - statistics]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *tensors[: ctx.count], *kept)


def _backward(ctx, gradients):
    x, *saved = ctx.saved_tensors
    parameters, kept = saved[: ctx.count], saved[ctx.count :]
    heads = [gradient is not None for gradient in gradients[: ctx.heads]]
    given = [gradient for gradient in gradients[: ctx.heads] if gradient is not None]
    needs_input = ctx.needs_input_grad[0]
    rest = (ctx.handle, ctx.training, ctx.dtype, needs_input, ctx.ops, ctx.group, ctx.recompute)
    found = torch.ops.unetpp_fast.backward(x, parameters, kept, given, heads, *rest)
    entry = _entries[ctx.handle]
    named = dict(zip(_reached(entry, heads), found, strict=False))
    of_tensors = [named.get(name) for name in entry.parameters + entry.buffers]
    return found[-1] if needs_input else None, of_tensors, *[None] * 7


forward_op.register_autograd(_backward, setup_context=_setup_context)


def forward(network: Network, x: Tensor, dtype: torch.dtype, ops: str) -> list[Tensor]:
    """Logits of each head of `network` by the engine, in `dtype`; updates running statistics as the reference does."""
    modules = list(network.modules())  # once: a walk takes as long as launching twenty kernels
    tensors = [value for module in modules for value in module._parameters.values() if value is not None]
    keep = torch.is_grad_enabled() and (x.requires_grad or any(tensor.requires_grad for tensor in tensors))
    tensors += [value for module in modules for value in module._buffers.values()]
    norms = [module for module in modules if isinstance(module, NORMS)]
    training = "".join("1" if module.training else "0" for module in norms)
    group = network.sync_group if "1" in training else ""
    arguments = (x, tensors, network.handle, training, dtype, keep, ops, group, keep and network.recompute)
    results = torch.ops.unetpp_fast.forward(*arguments)
    heads = len(network.topology.heads)
    batch = [module for module in norms if module.training and not isinstance(module, InstanceNorm)]
    if batch:
        _update(batch, results[len(results) - 2 * len(batch) :], x.shape[0] > 0 or bool(group))
    return list(results[:heads])


@torch.no_grad()
def _update(norms: list[nn.Module], statistics: list[Tensor], any_image: bool) -> None:
    """Running statistics, with the norm's momentum or, where that is None, as the mean over all batches."""
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)
    if not any_image:
        return
    for momentum in {norm.momentum for norm in norms}:
        mine = [index for index, norm in enumerate(norms) if norm.momentum == momentum]
        for key, first in (("running_mean", 0), ("running_var", 1)):
            running = [getattr(norms[index], key) for index in mine]
            found = [statistics[2 * index + first].to(old.dtype) for index, old in zip(mine, running, strict=True)]
            if momentum is None:
                for index, old, new in zip(mine, running, found, strict=True):
                    old.lerp_(new, norms[index].num_batches_tracked.to(old.dtype).reciprocal())
            else:
                torch._foreach_lerp_(running, found, momentum)
