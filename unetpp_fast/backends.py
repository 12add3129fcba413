"""Who computes a forward pass, and why.

`reference` is plain PyTorch. `triton` runs the whole pass as one operator over level buffers (`fused.py`), with the
kernels of `kernels/`; `cuda` does the same, its narrow convolutions by the kernels of `csrc/`. `cpu` does inference on a
CPU with oneDNN's convolutions (`cpu.py`). A backend that cannot run says why, and the reference takes over.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import distributed, extension, plan, reference
from .checks import check_input

try:
    from . import cpu, cpu_ops, cpu_weights, fused, tuning
except ModuleNotFoundError:  # kernels/ is a package only once installed
    cpu = cpu_ops = cpu_weights = fused = tuning = None

if TYPE_CHECKING:
    from .models import Network

BACKENDS = ("reference", "triton", "cuda", "cpu")
_ASK_FOR_TRAINING = (nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout)
_agreements: dict[tuple, str] = {}  # by structure, precision and process group
MOST_CLASSES = 64  # of `kernels/head.py`
LEAST_CPU_PIXELS = 8192  # of a batch; with fewer, comparing the weights costs more than the backend gains
LEAST_GFLOP_A_NODE = 0.014  # of a batch, with packed weights; with fewer, the calls of a node outweigh its convolutions
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check(name: str) -> str:
    """`name` if it is "auto" or a backend of this version.

    Raises:
        ValueError: it is not; the message says which there are.
    """
    if name == "auto" or name in BACKENDS:
        return name
    raise ValueError(f"backend {name!r} is not known: use one of {['auto', *BACKENDS]}")


def register(network: Network) -> int | None:
    """The number by which the fused operators know a network's structure, None if they cannot run it."""
    return fused.register(network) if fused else None


def choose(network: Network, x: Tensor) -> tuple[str, str]:
    """The backend that computes `network(x)`, and the reason.

    "auto" takes the kernels where they were found right and faster on this GPU, the reference elsewhere. That is measured
    by the first call of each size, or beforehand by `unetpp_fast.tune`, which looks for the fastest way of every node too.
    On a CPU it takes the CPU backend for inference. Weights may change between calls in any way: they are compared by value
    with those that were packed.
    """
    if network.backend == "reference":
        return "reference", "asked for"
    if network.backend == "cpu" or (network.backend == "auto" and _is_for_cpu(x)):
        runs, reason = can_run_cpu(network, x)
        if runs and network.backend == "auto" and x.shape[0] * math.prod(x.shape[2:]) < LEAST_CPU_PIXELS:
            return "reference", f"there are fewer than {LEAST_CPU_PIXELS} pixels: backend='cpu' would take longer"
        return ("cpu" if runs else "reference"), reason
    runs, reason = (can_run_cuda if network.backend == "cuda" else can_run_triton)(network, x)
    if not runs:
        return "reference", reason
    if network.backend in ("triton", "cuda"):
        return network.backend, "asked for"
    return _agreed(network, x) if network.sync_group and network.training else _measured(network, x)


def _agreed(network: Network, x: Tensor) -> tuple[str, str]:
    """One backend for all processes that share statistics: they exchange them in a backend's own way."""
    place = network.handle, compute_dtype(x), network.sync_group
    if place not in _agreements:
        group = distributed.group_of(network.sync_group)
        mine = BACKENDS.index(_measured(network, x)[0]) if group.rank() == 0 else 0
        _agreements[place] = BACKENDS[distributed.agreed(mine, group, x.device)]
    return _agreements[place], "measured by the first process for all that share statistics"


def _measured(network: Network, x: Tensor) -> tuple[str, str]:
    dtype, training = compute_dtype(x), torch.is_grad_enabled() and network.training
    found = tuning.verdict(network, x, dtype, training)
    if found and found.get("backend") == "cuda" and not extension.load()[0]:
        found = None  # they were there when it was measured
    if found is None and tuning.may_measure(x):
        found = tuning.judge(network, x, dtype, training, _kernels(network, x))
    if found is None:
        return "reference", "not measured on this GPU for this size: unetpp_fast.tune(model, x) does"
    if "error" in found:
        return "reference", f"the kernels failed when they were tried: {found['error']}"
    if not found["right"]:
        return "reference", "the kernels gave a wrong result on this GPU when they were measured"
    name = found["backend"] if found["ratio"] > 1 else "reference"
    return name, f"measured: the kernels take {1 / found['ratio']:.2f} of the reference's time"


def _kernels(network: Network, x: Tensor) -> list[str]:
    """The backends for a GPU that can compute `network(x)`."""
    return ["triton", *(["cuda"] if can_run_cuda(network, x)[0] else [])]


def prepare(network: Network) -> None:
    """Reads what earlier measurements found about the GPU that a network was just moved to."""
    device = next(network.parameters()).device
    if tuning and device.type == "cuda" and fused.HAS_TRITON:
        tuning.load(device)


def tune(network: Network, x: Tensor, *, training: bool = True, progress: bool = True) -> dict[str, dict]:
    """Measures the kernels on this GPU for inputs like `x`, once; `backend="auto"` then uses them where they win.

    Without it, "auto" compares the kernels as they come with the reference. This times every way of each convolution
    first; then it checks the whole pass against float64 and times it against the reference. Takes minutes, mostly of
    compiling; what was found is kept on disk for this GPU, torch, triton and version of the kernels. Run it under
    `torch.autocast` to tune for half precision.

    Args:
        network: a model of this package, on a GPU; it is not changed.
        x: an input it takes, `[N, in_channels, *S]`, of the size and batch to tune for.
        training: measure forward and backward passes too.
        progress: show a bar.

    Returns:
        For "inference" (and "training"): "backend", the faster of those that are right; "right", whether the error of
        outputs (and gradients) against float64 is at most twice the reference's; "ratio", the reference's time over the
        kernels'; "reference_ms", "fused_ms".

    Raises:
        RuntimeError: the kernels cannot run `network(x)` here; the message says why.
    """
    check_input(network, x)
    runs, reason = can_run_triton(network, x)
    if not runs:
        raise RuntimeError(f"nothing to tune: {reason}")
    return tuning.tune(network, x, compute_dtype(x), training, progress, _kernels(network, x))


def can_run_triton(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether the Triton kernels can compute `network(x)`, and if not, why."""
    if fused and x.device.type != "cuda" and not fused.INTERPRETED:  # first: it costs nothing on a CPU
        return False, f"the kernels need a CUDA device, the input is on {x.device}"
    runs, reason = can_run_fused(network, x)
    if not runs:
        return runs, reason
    if not fused.HAS_TRITON:
        return False, "triton is not installed"
    if network.out_channels > MOST_CLASSES:
        return False, f"the kernels of the heads take up to {MOST_CLASSES} classes, not {network.out_channels}"
    if compute_dtype(x) not in KERNEL_DTYPES:
        return False, f"the kernels compute in float32, float16 and bfloat16, not {compute_dtype(x)}"
    return True, ""


def can_run_cuda(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether the kernels of `csrc/` can compute narrow convolutions of `network(x)`, Triton's the rest; if not, why."""
    runs, reason = can_run_triton(network, x)
    if not runs:
        return runs, reason
    loaded, reason = extension.load()
    if not loaded:
        return False, f"the CUDA kernels are off: {reason}"
    if compute_dtype(x) == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
        return False, 'the CUDA kernels compute float32 as TF32: set torch.backends.cudnn.conv.fp32_precision = "tf32"'
    if torch.cuda.get_device_capability(x.device) < (8, 0):
        return False, "the CUDA kernels need a GPU of compute capability 8.0 or later"
    return True, ""


def _is_for_cpu(x: Tensor) -> bool:
    """Whether "auto" asks for the CPU backend: not where Triton's interpreter is to run on the CPU, nor while someone
    watches the operators that run."""
    if fused is None or x.device.type != "cpu" or fused.INTERPRETED or torch.compiler.is_compiling():
        return False
    return torch.utils._python_dispatch._get_current_dispatch_mode() is None


def can_run_cpu(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether the CPU backend can compute `network(x)`; if not, why, and else with which operators."""
    if x.device.type != "cpu":
        return False, f"the CPU backend needs its input on a CPU, it is on {x.device}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack():
        return False, "compiling, tracing and torch.func need plain PyTorch operators"
    if any(module.training for module in network.modules() if isinstance(module, _ASK_FOR_TRAINING)):
        return False, "the CPU backend is for inference: call model.eval()"
    if torch.is_grad_enabled() and (x.requires_grad or any(value.requires_grad for value in network.parameters())):
        return False, "the CPU backend gives no gradients: use torch.no_grad() or torch.inference_mode()"
    runs, reason = can_run_fused(network, x)
    if not runs:
        return runs, reason
    if type(x) is not Tensor or compute_dtype(x) not in cpu_ops.DTYPES:
        return False, f"the CPU backend computes in float32 and bfloat16, not {compute_dtype(x)}"
    internal = cpu_ops.internal_reason(network.topology.spatial_dims, compute_dtype(x))
    if internal and network.backend == "auto":
        return False, internal
    return True, f"PyTorch's operators and in-place sums: {internal}" if internal else "oneDNN writes into kept memory"


def can_run_fused(network: Network, x: Tensor) -> tuple[bool, str]:
    """Whether `network(x)` can run over level buffers at all, and if not, why."""
    if fused is None:
        return False, "unetpp_fast.kernels is not installed: pip install -e ."
    if network.handle is None:
        reason = plan.unsupported(network.topology, network.options)
        return False, reason or "without a norm, the engine needs a slope >= 0: an output that tells the sign of its input"
    if not fused.is_as_registered(network):
        return False, "a layer was replaced, changed or given hooks, or this is a replica of nn.DataParallel"
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False, "an export needs plain PyTorch operators"
    if network.options["odd_sizes"] and network.sync_group and network.training:
        return False, "processes that share statistics must not differ in their backend, which odd sizes may make them"
    if network.options["odd_sizes"] and any(size % network.topology.multiple for size in x.shape[2:]):
        return False, f"sizes that are no multiple of {network.topology.multiple} run on the reference"
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
    if name == "reference":
        return reference.forward(network, x)
    if name == "cpu":
        plan, dtype = fused.plan_of(network), compute_dtype(x)
        return cpu.run(plan, cpu_weights.of_network(network, plan, dtype), x)
    return fused.forward(network, x, compute_dtype(x), name)
