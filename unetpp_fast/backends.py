"""Who computes a forward pass, and why.

`reference` is plain PyTorch. `triton` runs the whole pass as one operator over level buffers (`fused.py`), with the
kernels of `kernels/`. A backend that cannot run says why, and the reference takes over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference

try:
    from . import fused
except ModuleNotFoundError:  # kernels/ is a package only once installed
    fused = None

if TYPE_CHECKING:
    from .models import Network

BACKENDS = ("reference", "triton")
PLANNED = ("cuda", "cpu")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(name: str) -> str:
    """`name` if it is "auto" or a backend of this version.

    Raises:
        ValueError: it is not; the message says which there are.
    """
    if name == "auto" or name in BACKENDS:
        return name
    why = "is planned but not in this version" if name in PLANNED else "is not known"
    raise ValueError(f"backend {name!r} {why}: use one of {['auto', *BACKENDS]}")


def register(network: Network) -> int | None:
    """The number by which the fused operators know a network's structure, None if they cannot run it."""
    return fused.register(network) if fused else None


def choose(network: Network, x: Tensor) -> tuple[str, str]:
    """The backend that computes `network(x)`, and the reason."""
    if network.backend == "reference":
        return "reference", "asked for"
    if network.backend == "auto":
        return "reference", "the fused kernels have not been proven on a GPU yet; backend='triton' asks for them"
    runs, reason = can_run_triton(network, x)
    return ("triton", "asked for") if runs else ("reference", reason)


def can_run_triton(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can compute `network(x)`, and if not, why."""
    runs, reason = can_run_fused(network, x)
    if not runs:
        return runs, reason
    if not fused.HAS_TRITON:
        return False, "triton is not installed"
    if compute_dtype(x) not in KERNEL_DTYPES:
        return False, f"the kernels compute in float32, float16 and bfloat16, not {compute_dtype(x)}"
    if x.device.type != "cuda" and not fused.INTERPRETED:
        return False, f"the kernels need a CUDA device, the input is on {x.device}"
    return True, ""


def can_run_fused(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether `network(x)` can run over level buffers at all, and if not, why."""
    if fused is None:
        return False, "unetpp_fast.kernels is not installed: pip install -e ."
    if network.handle is None:
        return False, "the topology has nodes that do not read the leading nodes of their level"
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False, "an export needs plain PyTorch operators"
    if network.training and network.options["dropout"] > 0:
        return False, "dropout in training runs on the reference"
    weight = next(network.parameters())
    if compute_dtype(x) == x.dtype and weight.dtype != x.dtype:
        return False, f"the input is {x.dtype} and the weights are {weight.dtype}"
    if weight.device != x.device:
        return False, f"the input is on {x.device} and the weights are on {weight.device}"
    return True, ""


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of the maps: autocast's where it is on, else the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def forward(network: Network, x: Tensor) -> list[Tensor]:
    """Logits of every head of `network`, by the backend that `choose` picks."""
    name, _ = choose(network, x)
    return reference.forward(network, x) if name == "reference" else fused.forward(network, x, compute_dtype(x), name)
