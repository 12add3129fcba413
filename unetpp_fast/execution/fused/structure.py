"""What the fused operators know of a network besides its tensors.

Operators only take tensors, numbers and strings, so a structure is passed by its `handle`. Networks hold their structure;
the table from handles to structures holds weak references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

from torch import nn

from ...architecture.layers import InstanceNorm, Interpolate, NodeModule, PixelShuffle
from ...architecture.network_spec import NetworkSpec
from ...architecture.options import ACTIVATIONS, ENGINES
from ...architecture.options import unsupported as options_unsupported
from ..batch_statistics import SyncedBatchNorm2d, SyncedBatchNorm3d
from ..plan.steps import Plan, make_plan, unsupported

NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, InstanceNorm)
_ACTIVATIONS = {entry.layer for entry in ACTIVATIONS.values()}
_KNOWN_LAYERS = {
    *NORMS, SyncedBatchNorm2d, SyncedBatchNorm3d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    Interpolate, PixelShuffle, NodeModule, nn.ModuleDict, nn.Identity, nn.Dropout, *_ACTIVATIONS,
}  # fmt: skip
_SETTINGS = (
    "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "eps",
    "negative_slope", "mode", "align_corners",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Structure:
    """A plan, and the names of the tensors that a pass takes, in the order in which it takes them.

    parameters, buffers: those of the network, in the order of its modules. norms: the norms of its nodes, likewise.
    layers: what each layer computed when the structure was made; None if a layer did not fit the plan.
    unsupported: by backend, why it cannot compute the network's options; "" if it can.
    key: equal in every process for networks that compute the same from the same weights; names measurements.
    handle: equal for equal structures within this process.
    odd: the structure for sizes that are not a multiple of 2^depth; None if it is the same network that takes none.
    """

    plan: Plan
    out_channels: int
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    norms: tuple[str, ...]
    layers: tuple[tuple, ...] | None
    unsupported: Mapping[str, str]
    key: str
    handle: str
    odd: Structure | None = None

    def __deepcopy__(self, memo: dict) -> Structure:
        return self

    def fits(self, network: NetworkSpec, modules: Sequence[nn.Module]) -> bool:
        """Whether the layers of `network`, its `modules()`, are still those that it was built with.

        Layers may have been replaced, parametrised or hooked, or have no parameters in a replica of `nn.DataParallel`; what
        they compute is then only known by calling them.
        """
        return self.layers is not None and _layers(network, modules, self.plan) == self.layers

    def modes(self, training: str, keep: bool) -> dict[str, str]:
        """How each norm of a pass gets its statistics, by name; see `forward.Forward`.

        training: "1" for each norm in training mode, "0" for the others. Batch norms are folded into the weights only if no
        backward pass follows and none of them is in training mode.
        """
        if self.plan.norm == "instance":
            return dict.fromkeys(self.norms, "instance")
        still = "frozen" if keep or "1" in training else "folded"
        return {name: "batch" if mine == "1" else still for name, mine in zip(self.norms, training, strict=True)}

    def nodes_of(self, heads: Sequence[bool]) -> set[str]:
        """Names of the nodes that a backward pass reaches; `heads`: whether each head has a gradient."""
        topology = self.plan.topology
        columns = [column for column, given in zip(topology.heads, heads, strict=True) if given]
        return {node.name for column in columns for node in topology.pruned(column).nodes}

    def parameters_of(self, heads: Sequence[bool]) -> list[str]:
        """Names of the parameters that a backward pass reaches; `heads`: whether each head has a gradient."""
        topology = self.plan.topology
        columns = [column for column, given in zip(topology.heads, heads, strict=True) if given]
        reached = {f"nodes.{name}" for name in self.nodes_of(heads)}
        reached |= {f"heads.{topology[0, column].name}" for column in columns}
        return [name for name in self.parameters if ".".join(name.split(".")[:2]) in reached]


_alive: WeakValueDictionary[str, Structure] = WeakValueDictionary()
_kept: set[Structure] = set()  # those in compiled graphs, which hold only the handle


def structure_of(network: NetworkSpec) -> Structure | None:
    """The structure of a network, shared by all equal networks of this process; None if it has no plan
    (`plan.steps.unsupported` says why)."""
    if unsupported(network.topology, network.options):
        return None
    plan = make_plan(network.topology, network.options)
    facts = {
        "plan": plan,
        "out_channels": network.out_channels,
        "parameters": tuple(name for name, _ in network.named_parameters(remove_duplicate=False)),
        "buffers": tuple(name for name, _ in network.named_buffers(remove_duplicate=False)),
        "norms": tuple(name for name, module in network.nodes.named_modules() if isinstance(module, NORMS)),
        "layers": _layers(network, list(network.modules()), plan),
        "unsupported": {backend: options_unsupported(network.options, backend) for backend in ENGINES},
    }
    odd = _shared({**facts, "plan": plan.of_odd_sizes}, None) if network.options.get("odd_sizes") else None
    return _shared(facts, odd)


def _shared(facts: Mapping[str, object], odd: Structure | None) -> Structure:
    """The structure of these facts, the same for all networks of this process that have them."""
    key, handle = _digest(f"{facts['plan']!r} {facts['out_channels']}"), _digest(repr((facts, odd is not None)))
    structure = _alive.get(handle)
    if structure is None:
        structure = _alive[handle] = Structure(**facts, key=key, handle=handle, odd=odd)
    return structure


def find(handle: str) -> Structure:
    """The structure with this handle; a network, a pass in flight or a compiled graph must hold it."""
    return _alive[handle]


def keep(structure: Structure) -> None:
    """Holds a structure for the rest of the process."""
    _kept.add(structure)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layers(network: NetworkSpec, modules: Sequence[nn.Module], plan: Plan) -> tuple[tuple, ...] | None:
    """What each layer computes: its type, settings and number of parameters; None if a layer does not fit the plan."""
    layers = []
    for module in modules:
        if module is network:
            continue
        hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
        if type(module) not in _KNOWN_LAYERS or any(hooks) or "forward" in module.__dict__:
            return None
        if isinstance(module, NORMS) and module.eps != plan.eps:
            return None
        if type(module) in _ACTIVATIONS and getattr(module, "negative_slope", 0.0) != plan.slope:
            return None
        count = sum(value is not None for value in module._parameters.values())
        if not count and hasattr(module, "out_channels"):  # a convolution in a replica of nn.DataParallel
            return None
        layers.append((type(module), count, *map(module.__dict__.get, _SETTINGS)))
    return tuple(layers) if all(head.out_channels == network.out_channels for head in network.heads.values()) else None
