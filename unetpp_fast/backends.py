"""Who computes a forward pass. Every backend takes a network and an input, and returns the logits of its heads.

`"auto"` picks the best one that can run. In this version that is the plain-PyTorch reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from . import reference

if TYPE_CHECKING:
    from .models import Network

BACKENDS = {"reference": reference.forward}
PLANNED = ("triton", "cuda", "cpu")


def check(name: str) -> str:
    """`name` if it is "auto" or a backend of this version.

    Raises:
        ValueError: it is not; the message says which there are.
    """
    if name == "auto" or name in BACKENDS:
        return name
    why = "is planned but not in this version" if name in PLANNED else "is not known"
    raise ValueError(f"backend {name!r} {why}: use one of {['auto', *BACKENDS]}")


def forward(network: Network, x: Tensor) -> list[Tensor]:
    """Logits of every head of `network`, by the backend it asks for."""
    return BACKENDS["reference" if network.backend == "auto" else network.backend](network, x)
