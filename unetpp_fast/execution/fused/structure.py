"""What the fused operators know of a network besides its tensors.

Operators only take tensors, numbers and strings, so a structure is passed by its `handle`. Networks hold their structure;
the table from handles to structures holds weak references.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from torch import nn

from ...architecture.layers import InstanceNorm
from ...architecture.network_spec import NetworkSpec
from ...architecture.options import ENGINES
from ...architecture.options import unsupported as options_unsupported
from ..plan.steps import Plan, make_plan, unsupported

NORMS = (nn.BatchNorm2d, nn.BatchNorm3d, InstanceNorm)


@dataclass(frozen=True, eq=False)
class Structure:
    """A plan, and the names of the tensors that a pass takes, in the order in which it takes them.

    It is that of the network as it was built, whatever was done to its layers since (`execution.built` tells).

    parameters, buffers: those of the network, in the order of its modules. norms: the norms of its nodes, likewise.
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
    unsupported: Mapping[str, str]
    key: str
    handle: str
    odd: Structure | None = None

    def __deepcopy__(self, memo: dict) -> Structure:
        return self

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
        # The last blocks of a plan with gates have one that does not run.
        never = tuple(f"nodes.{step.node.name}.attention1." for step in self.plan.steps if step.source != "gated")
        mine = [name for name in self.parameters if ".".join(name.split(".")[:2]) in reached]
        return [name for name in mine if not name.startswith(never)]


_alive: WeakValueDictionary[str, Structure] = WeakValueDictionary()
_kept: set[Structure] = set()  # those in compiled graphs, which hold only the handle


def structure_of(network: NetworkSpec) -> Structure | None:
    """The structure of a network, shared by all equal networks of this process; None if it has no plan
    (`plan.steps.unsupported` says why)."""
    if unsupported(network.topology, network.options):
        return None
    plan = make_plan(network.topology, network.options)
    layers = network.built.items()
    facts = {
        "plan": plan,
        "out_channels": network.out_channels,
        "parameters": tuple(f"{layer}.{name}" for layer, (_, names, _) in layers for name in names),
        "buffers": tuple(f"{layer}.{name}" for layer, (_, _, names) in layers for name in names),
        "norms": tuple(layer.partition(".")[2] for layer, (facts, *_) in layers if issubclass(facts[0], NORMS)),
        "unsupported": {backend: _unsupported(network, backend) for backend in ENGINES},
    }
    odd = _shared({**facts, "plan": plan.of_odd_sizes}, None) if network.options.get("odd_sizes") else None
    return _shared(facts, odd)


def _unsupported(network: NetworkSpec, backend: str) -> str:
    if network.topology.unlike_axes and backend != "cpu":
        return "strides and kernels that differ between axes run on the reference on a GPU"
    return options_unsupported(network.options, backend)


def _shared(facts: Mapping[str, Any], odd: Structure | None) -> Structure:
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
