"""What the layers of a network computed when it was built, and whether they still compute that.

The fused operators, folding and plain-data descriptions (`Network.config`) know a network by its options. Users may replace,
parametrise, patch or hook any layer: what such a network computes is only known by calling its modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ..architecture.gates import ChannelSpatialGate, GatedNode
from ..architecture.layers import InstanceNorm, Interpolate, NodeModule, PixelShuffle
from ..architecture.network_spec import NetworkSpec
from ..architecture.options import ACTIVATIONS
from .batch_statistics import SyncedBatchNorm2d, SyncedBatchNorm3d

SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "dilation", "groups",
    "padding_mode", "num_features", "channels", "eps", "affine", "track_running_stats", "negative_slope", "mode",
    "align_corners", "odd_sizes", "gated_input", "factors", "num_groups", "approximate", "num_parameters",
)  # fmt: skip
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHODS = ("forward", "_call_impl", "_conv_forward", "join", "convolve")  # what a call of a layer goes through
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {SyncedBatchNorm2d: nn.BatchNorm2d, SyncedBatchNorm3d: nn.BatchNorm3d}
_CLASSES = (
    nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm,
    nn.Dropout, nn.Identity,
    InstanceNorm, Interpolate, NodeModule, PixelShuffle, ChannelSpatialGate,
    GatedNode, *{entry.layer for entry in ACTIVATIONS.values()},
)  # fmt: skip
_OWN_METHODS = [(kind, name, getattr(kind, name)) for kind in _CLASSES for name in METHODS if hasattr(kind, name)]
Facts = tuple  # of a layer: its type, how many parameters and buffers it has, and its settings
Built = Mapping[str, tuple[Facts, tuple[str, ...], tuple[str, ...]]]  # with the names of its parameters and buffers


def layers_of(network: NetworkSpec) -> list[nn.Module]:
    """The layers of a network's nodes and heads; what else a subclass holds is no part of a pass."""
    return [*network.nodes.modules(), *network.heads.modules()]


def built(network: NetworkSpec) -> Built:
    """What each layer computes now, by its name in the network, in the order of `layers_of`."""
    return {name: (_facts(module), *_names(module)) for name, module in _named(network)}


def facts(module: nn.Module) -> Facts:
    """What a layer computes, apart from the values of its tensors; never equal to that of a layer that is patched or hooked.

    A batch norm over several processes is one of this process: both have the same statistics in evaluation.
    """
    values = module.__dict__
    if (
        values["_forward_hooks"]
        or values["_forward_pre_hooks"]
        or values["_backward_hooks"]
        or values["_backward_pre_hooks"]
    ):
        return ("hooks",)
    for name in METHODS:
        if name in values:
            return ("patched", name)
    return _facts(module)


def _facts(module: nn.Module) -> Facts:
    parameters = sum(value is not None for value in module._parameters.values())
    buffers = sum(value is not None for value in module._buffers.values())
    kind = type(module)
    return (_PLAIN.get(kind, kind), parameters, buffers, *map(module.__dict__.get, SETTINGS))


def changed(network: NetworkSpec, modules: Sequence[nn.Module] | None = None) -> str:
    """Which layer is not as it was when the network was built, and how it differs; "" if all are.

    modules: `layers_of(network)`, if they are known.
    """
    modules = layers_of(network) if modules is None else modules
    same = not _has_any_global_hook() and list(map(facts, modules)) == [layer for layer, *_ in network.built.values()]
    if same and (torch.compiler.is_compiling() or all(getattr(kind, name) is method for kind, name, method in _OWN_METHODS)):
        return ""
    return f"a layer was replaced, changed or given hooks: {_difference(network)}"


def _difference(network: NetworkSpec) -> str:
    """The first difference, in words."""
    if _has_any_global_hook():
        return "there are hooks for all modules"
    now, before = dict(_named(network)), network.built
    for name in [*before, *now]:
        if name not in now or name not in before:
            return f"{name} is {'new' if name in now else 'gone, or one with another layer'}"
        module, ((kind, *counts_and_settings), *_) = now[name], before[name]
        found = facts(module)
        if found != (kind, *counts_and_settings):
            return f"{name} {_how(type(module).__name__, found, kind, counts_and_settings)}"
    kind, name, _ = next(entry for entry in _OWN_METHODS if getattr(entry[0], entry[1]) is not entry[2])
    return f"{name} of the class {kind.__name__} was replaced"


def _how(mine: str, found: Facts, kind: type, before: Facts) -> str:
    """How a layer of type `mine` with the facts `found` differs from one of type `kind` with the other facts `before`."""
    if found[0] == "hooks":
        return "has hooks"
    if found[0] == "patched":
        return f"has another {found[1]}"
    if found[0] is not kind:
        return f"is a {mine}, it was built as a {kind.__name__}"
    for setting, value, built_with in zip(SETTINGS, found[3:], before[2:], strict=True):
        if value != built_with:
            return f"has {setting}={value!r}, it was built with {built_with!r}"
    replica = "" if found[1] else " (is this a replica of nn.DataParallel?)"
    return f"has {found[1]} parameters and {found[2]} buffers, it was built with {before[0]} and {before[1]}{replica}"


def _named(network: NetworkSpec) -> Iterable[tuple[str, nn.Module]]:
    for part, modules in (("nodes", network.nodes), ("heads", network.heads)):
        yield from modules.named_modules(prefix=part)


def _names(module: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    tensors: Iterable[dict[str, Any]] = (module._parameters, module._buffers)
    parameters, buffers = (tuple(name for name, value in part.items() if value is not None) for part in tensors)
    return parameters, buffers
