"""Who computes a forward pass, and why.

`reference` is plain PyTorch. `triton` runs the whole pass as one operator over level buffers (`fused.py`), with the
kernels of `kernels/`. A backend that cannot run says why, and the reference takes over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import reference
from .checks import check_input
from .topology import Node

try:
    from . import fused, tuning
except ModuleNotFoundError:  # kernels/ is a package only once installed
    fused = tuning = None

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
    """The backend that computes `network(x)`, and the reason.

    "auto" takes the kernels where `unetpp_fast.tune` found them right and faster on this GPU, the reference elsewhere.
    """
    if network.backend == "reference":
        return "reference", "asked for"
    runs, reason = can_run_triton(network, x)
    if not runs:
        return "reference", reason
    if network.backend == "triton":
        return "triton", "asked for"
    return _measured(network, x)


def _measured(network: Network, x: Tensor) -> tuple[str, str]:
    found = tuning.verdict(network, x, compute_dtype(x), torch.is_grad_enabled() and network.training)
    if found is None:
        return "reference", "not measured on this GPU for this size: unetpp_fast.tune(model, x) does"
    if not found["right"]:
        return "reference", "the kernels gave a wrong result on this GPU when they were measured"
    name = "triton" if found["ratio"] > 1 else "reference"
    return name, f"measured: the kernels take {1 / found['ratio']:.2f} of the reference's time"


def prepare(network: Network) -> None:
    """Reads what earlier measurements found about the GPU that a network was just moved to."""
    device = next(network.parameters()).device
    if tuning and device.type == "cuda" and fused.HAS_TRITON:
        tuning.load(device)


def tune(network: Network, x: Tensor, *, training: bool = True, progress: bool = True) -> dict[str, dict]:
    """Measures the kernels on this GPU for inputs like `x`, once; `backend="auto"` then uses them where they win.

    Times the candidates of every convolution, checks the whole pass against float64 and times it against the reference.
    Takes minutes, mostly of compiling; what was found is kept on disk for this GPU, torch, triton and version of the
    kernels. Run it under `torch.autocast` to tune for half precision.

    Args:
        network: a model of this package, on a GPU; it is not changed.
        x: an input it takes, `[N, in_channels, *S]`, of the size and batch to tune for.
        training: measure forward and backward passes too.
        progress: show a bar.

    Returns:
        For "inference" (and "training"): "right", whether the error of outputs (and gradients) against float64 is at
        most twice the reference's; "ratio", the reference's time over the kernels'; "reference_ms", "fused_ms".

    Raises:
        RuntimeError: the kernels cannot run `network(x)` here; the message says why.
    """
    check_input(network, x)
    runs, reason = can_run_triton(network, x)
    if not runs:
        raise RuntimeError(f"nothing to tune: {reason}")
    return tuning.tune(network, x, compute_dtype(x), training, progress)


def can_run_triton(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can compute `network(x)`, and if not, why."""
    if fused and x.device.type != "cuda" and not fused.INTERPRETED:  # first: it costs nothing on a CPU
        return False, f"the kernels need a CUDA device, the input is on {x.device}"
    runs, reason = can_run_fused(network, x)
    if not runs:
        return runs, reason
    if not fused.HAS_TRITON:
        return False, "triton is not installed"
    if compute_dtype(x) not in KERNEL_DTYPES:
        return False, f"the kernels compute in float32, float16 and bfloat16, not {compute_dtype(x)}"
    return True, ""


def can_run_fused(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether `network(x)` can run over level buffers at all, and if not, why."""
    if fused is None:
        return False, "unetpp_fast.kernels is not installed: pip install -e ."
    if network.handle is None:
        return False, "the engine needs nodes that read the leading nodes of their level, and without a norm a slope >= 0"
    if not fused.is_as_registered(network):
        return False, "a layer was replaced, changed or given hooks, or this is a replica of nn.DataParallel"
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


def explain(network: Network, x: Tensor) -> str:
    """Prints and returns, for each node of `network(x)`, the backend that runs it, what it reads and the reason.

    Args:
        network: a model of this package.
        x: an input it takes, `[N, in_channels, *S]`; nothing is computed.

    Raises:
        TypeError, ValueError: the network does not take `x`.
    """
    check_input(network, x)
    name, reason = choose(network, x)
    size = "x".join(map(str, x.shape[2:]))
    lines = [f"{x.shape[0]} image(s) of {size} pixels in {compute_dtype(x)} on {x.device}: {name} ({reason})"]
    plan = fused.plan_of(network) if fused and name != "reference" else None
    for index, node in enumerate(network.topology.nodes):
        what = plan.describe(plan.steps[index]) if plan else _describe(network, node)
        lines.append(f"{name:<10} {what}")
    text = "\n".join(lines)
    print(text)
    return text


def _describe(network: Network, node: Node) -> str:
    """What the reference does for a node."""
    i, j = node.position
    if not j:
        return f"X({i},0) -> {node.width} channels from {'the image' if i == 0 else f'the pooled X({i - 1},0)'}"
    maps = ", ".join(f"X({i},{column})" for column in node.prefix)
    return f"X({i},{j}) -> {node.width} channels from a concatenation of {maps} and the up-sampled X({i + 1},{j - 1})"
