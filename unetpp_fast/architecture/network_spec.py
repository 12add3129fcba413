"""What the code below `models` knows of a network: everything that computes a pass takes a `NetworkSpec`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from .topology import Topology


class NetworkSpec(Protocol):
    """A network over a topology; `unetpp_fast.models.network.Network` is the implementation.

    options: the options that all nodes share, by the names of `Network`'s arguments.
    backend: "auto" or a name in `execution.dispatch.BACKENDS`.
    structure: what the fused operators know of it (`execution.fused.structure.Structure`); None if they cannot run it.
    built: what each layer computed when the network was built (`execution.built.built`).
    sync_group: the name of the process group over which batch norms take their statistics, "" for this process only.
    recompute: whether backward passes recompute the inside of nodes.
    exclusive: whether the classes that it was trained on exclude one another.
    normalisation: how the images that it was trained on were prepared (`models.normalisation`), or None.
    multiple, multiples: every spatial axis of the image is a multiple of the former, or of its own of the latter.
    """

    out_channels: int
    backend: str
    structure: Any
    sync_group: str
    recompute: bool
    normalisation: Any
    training: bool
    nodes: nn.ModuleDict
    heads: nn.ModuleDict

    @property
    def topology(self) -> Topology: ...

    @property
    def options(self) -> Mapping[str, Any]: ...

    @property
    def built(self) -> Mapping[str, Any]: ...

    @property
    def exclusive(self) -> bool: ...

    @property
    def multiple(self) -> int: ...

    @property
    def multiples(self) -> tuple[int, ...]: ...

    def modules(self) -> Iterator[nn.Module]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self, *, remove_duplicate: bool = True) -> Iterator[tuple[str, Tensor]]: ...

    def train(self, mode: bool = True) -> NetworkSpec: ...

    def gflop(self, size: tuple[int, ...]) -> float: ...

    def refresh_handle(self) -> None: ...

    def logits(self, x: Tensor) -> list[Tensor]: ...

    def engine_input(self, x: Tensor) -> tuple[NetworkSpec, Tensor | list[Tensor]]:
        """What the backends compute for an image `x`, which is checked: a network and its input."""
        ...

    def part(self, level: int, keep_heads: bool) -> NetworkSpec: ...
