"""What the backends compute of a network over an encoder: all but the encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..execution.built import built
from ..execution.fused.structure import structure_of


class Nest(nn.Module):
    """All of an `EncodedNetwork` but its encoder, on the same modules, as the backends take it (`NetworkSpec`): a network
    whose input are the encoder's maps.

    Its levels are counted from the image's size, so node x0_1 of the `EncodedNetwork` is X(1,1) here, and its last block
    after X(0,j) is X(0,j + 1) (`Topology.over_maps`). `whole` is an `EncodedNetwork`.
    """

    def __init__(self, whole: Any):
        super().__init__()
        nodes = whole.topology.nodes
        self.topology, self.out_channels = whole.topology.over_maps(whole.last_width), whole.out_channels
        unused = {"odd_sizes": False, "downsample": "pool", "head_bias": True}
        self.options: dict[str, Any] = {**whole.options, **unused, "attention": whole.attention, "head_taps": 3}
        self.follow(whole)
        names = {whole.topology[0, column].name: self.topology[0, column + 1].name for column in whole.topology.heads}
        inner = {f"x{node.level + 1}_{node.column}": whole.nodes[node.name] for node in nodes if node.column}
        self.nodes = nn.ModuleDict({**inner, **{mine: whole.lasts[name] for name, mine in names.items()}})
        self.heads = nn.ModuleDict({mine: whole.heads[name] for name, mine in names.items()})
        kept = {"nodes", "heads", *(f"nodes.{name}" for name in self.nodes), *(f"heads.{name}" for name in self.heads)}
        recorded = {name: facts for name, facts in whole.built.items() if ".".join(name.split(".")[:2]) in kept}
        self.built = recorded or built(self)
        self.refresh_handle()

    def refresh_handle(self) -> None:
        """As `Network.refresh_handle`."""
        self.structure = structure_of(self)

    def follow(self, whole: Any) -> None:
        """Takes over the settings of `whole` that have changed; a graph can hold it only where none has."""
        for name in ("backend", "training", "sync_group", "recompute"):
            if getattr(self, name, None) != getattr(whole, name):
                setattr(self, name, getattr(whole, name))

    def is_of(self, whole: Any) -> bool:
        """Whether these are still the modules of `whole`."""
        theirs = [*whole.nodes.values(), *whole.lasts.values(), *whole.heads.values()]
        mine = [*self.nodes.values(), *self.heads.values()]
        return len(mine) == len(theirs) and all(one is other for one, other in zip(mine, theirs, strict=True))
