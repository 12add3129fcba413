"""Chooses the backend that computes a forward pass, and says why.

`reference` is plain PyTorch. `triton` runs the whole pass as one operator over level buffers (`fused/`) with the kernels of
`kernels/`; `cuda` does the same but uses the kernels of `csrc/` for narrow convolutions. `cpu` does inference on a CPU with
oneDNN's convolutions (`cpu/`). A backend that cannot run says why, and the reference takes over.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.network_spec import NetworkSpec
from ..architecture.options import ENGINES, training_unsupported
from ..architecture.precision import unsupported_dtype
from ..kernels.naive import MOST_CLASSES
from . import batch_statistics, reference
from .call import Call
from .cpu import convolutions, packed_weights, passes
from .fused import cuda_library, operators, ops, tuning
from .plan import steps

BACKENDS = ("reference", *ENGINES)
MODE_DEPENDENT_LAYERS = (nn.BatchNorm2d, nn.BatchNorm3d, nn.Dropout)
MIN_CPU_PIXELS = 8192  # per batch; below, comparing the weights costs more than the backend gains
MIN_GFLOP_PER_NODE = 0.014  # per batch, with packed weights; below, calling a node takes longer than its convolutions
_agreements: dict[tuple, str] = {}  # by structure, precision and process group


def check(name: str) -> str:
    """`name` if it is "auto" or a backend of this version.

    Raises:
        ValueError: it is not; the message lists the backends.
    """
    if name == "auto" or name in BACKENDS:
        return name
    raise ValueError(f"backend {name!r} is not known: use one of {['auto', *BACKENDS]}")


def choose(call: Call) -> tuple[str, str]:
    """The backend that computes `call`, and the reason.

    On a GPU "auto" takes the kernels if they were measured to be right and faster, otherwise the reference. The first call
    of each size measures, or `unetpp_fast.tune` does so beforehand and also finds the fastest way of every node. On a CPU
    "auto" takes the CPU backend for inference. Weights may change between calls in any way: they are compared by value with
    those that were packed.
    """
    backend, x = call.network.backend, call.x
    if backend == "reference":
        return "reference", "asked for"
    if backend == "cpu" or (backend == "auto" and _is_for_cpu(x)):
        runs, reason = can_run_cpu(call)
        if runs and backend == "auto" and x.shape[0] * math.prod(x.shape[2:]) < MIN_CPU_PIXELS:
            return "reference", f"there are fewer than {MIN_CPU_PIXELS} pixels: backend='cpu' would take longer"
        return ("cpu" if runs else "reference"), reason
    runs, reason = (can_run_cuda if backend == "cuda" else can_run_triton)(call)
    if not runs:
        return "reference", reason
    if backend in ("triton", "cuda"):
        return backend, "asked for"
    return _agreed(call) if call.network.sync_group and call.network.training else _measured(call)


def _agreed(call: Call) -> tuple[str, str]:
    """One backend for all processes that share statistics: each backend exchanges them in its own way."""
    network = call.network
    place = network.structure.handle, call.dtype, network.sync_group
    if place not in _agreements:
        group = batch_statistics.group_of(network.sync_group)
        mine = BACKENDS.index(_measured(call)[0]) if group.rank() == 0 else 0
        _agreements[place] = BACKENDS[batch_statistics.agreed(mine, group, call.x.device)]
    return _agreements[place], "measured by the first process for all that share statistics"


def _measured(call: Call) -> tuple[str, str]:
    training = torch.is_grad_enabled() and call.network.training
    verdict = tuning.verdict(call, training)
    if verdict and verdict.get("backend") == "cuda" and not cuda_library.load()[0]:
        verdict = None  # the library was there when this was measured
    if verdict is None and tuning.may_measure(call.x):
        verdict = tuning.judge(call, training, _kernels(call))
    if verdict is None:
        return "reference", "not measured on this GPU for this size: unetpp_fast.tune(model, x) does"
    if "error" in verdict:
        return "reference", f"the kernels failed when they were tried: {verdict['error']}"
    if not verdict["right"]:
        return "reference", "the kernels gave a wrong result on this GPU when they were measured"
    name = verdict["backend"] if verdict["ratio"] > 1 else "reference"
    return name, f"measured: the kernels take {1 / verdict['ratio']:.2f} of the reference's time"


def _kernels(call: Call) -> list[str]:
    """The GPU backends that can compute `call`."""
    return ["triton", *(["cuda"] if can_run_cuda(call)[0] else [])]


def prepare(network: NetworkSpec) -> None:
    """Reads earlier measurements of the GPU that a network was just moved to."""
    device = next(network.parameters()).device
    if device.type == "cuda" and ops.HAS_TRITON:
        tuning.load(device)


def tune(network: NetworkSpec, x: Tensor, *, training: bool = True, progress: bool = True) -> dict[str, dict]:
    """Measures the kernels on this GPU for inputs like `x`, once; `backend="auto"` then uses them where they win.

    Without it, "auto" compares the default kernels with the reference. This first times every way of each convolution; then
    it checks the whole pass against float64 and times it against the reference. It takes minutes, mostly to compile. Results
    are kept on disk by GPU, torch, triton and kernel sources. Run it under `torch.autocast` to tune for half precision.

    Args:
        network: a model of this package on a GPU; it is not changed.
        x: `[N, in_channels, *S]`, of the size and batch to tune for.
        training: measure forward and backward passes too.
        progress: show a progress bar.

    Returns:
        For "inference" (and "training"): "backend", the fastest that is right; "right", whether outputs (and gradients) are
        within twice the reference's error against float64; "ratio", the reference's time over the kernels'; "reference_ms",
        "fused_ms".

    Raises:
        RuntimeError: the kernels cannot run `network(x)` here; the message says why.
    """
    check_input(network, x)
    call = Call(network, x)
    runs, reason = can_run_triton(call)
    if not runs:
        raise RuntimeError(f"nothing to tune: {reason}")
    return tuning.tune(call, training, progress, _kernels(call))


def can_run_triton(call: Call) -> tuple[bool, str]:
    """Whether the Triton kernels can compute `call`; if not, why."""
    network, x = call.network, call.x
    if reason := never_runs(network, "triton"):
        return False, reason
    if x.device.type != "cuda" and not ops.INTERPRETED:
        return False, f"the kernels need a CUDA device, the input is on {x.device}"
    runs, reason = can_run_fused(call, "triton")
    if not runs:
        return runs, reason
    if not ops.HAS_TRITON:
        return False, "triton is not installed"
    if network.out_channels > MOST_CLASSES:
        return False, f"the kernels of the heads take up to {MOST_CLASSES} classes, not {network.out_channels}"
    reason = unsupported_dtype(call.dtype, "triton")
    return not reason, reason


def can_run_cuda(call: Call) -> tuple[bool, str]:
    """Whether the kernels of `csrc/` can compute the narrow convolutions of `call`, and Triton's the rest; if not, why."""
    runs, reason = can_run_triton(call)
    if not runs:
        return runs, reason
    if reason := never_runs(call.network, "cuda"):
        return False, reason
    loaded, reason = cuda_library.load()
    if not loaded:
        return False, f"the CUDA kernels are off: {reason}"
    if call.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":
        return False, 'the CUDA kernels compute float32 as TF32: set torch.backends.cudnn.conv.fp32_precision = "tf32"'
    if torch.cuda.get_device_capability(call.x.device) < (8, 0):
        return False, "the CUDA kernels need a GPU of compute capability 8.0 or later"
    return True, ""


def _is_for_cpu(x: Tensor) -> bool:
    """Whether "auto" considers the CPU backend: not when Triton's interpreter runs on the CPU, nor inside a dispatch mode
    that observes operators."""
    if x.device.type != "cpu" or ops.INTERPRETED or torch.compiler.is_compiling():
        return False
    return torch.utils._python_dispatch._get_current_dispatch_mode() is None


def can_run_cpu(call: Call) -> tuple[bool, str]:
    """Whether the CPU backend can compute `call`, and with which operators; if not, why."""
    network, x = call.network, call.x
    if reason := never_runs(network, "cpu"):
        return False, reason
    if x.device.type != "cpu":
        return False, f"the CPU backend needs its input on a CPU, it is on {x.device}"
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack():
        return False, "compiling, tracing and torch.func need plain PyTorch operators"
    if any(module.training for module in call.modules if isinstance(module, MODE_DEPENDENT_LAYERS)):
        return False, "the CPU backend is for inference: call model.eval()"
    if call.needs_gradients:
        return False, "the CPU backend gives no gradients: use torch.no_grad() or torch.inference_mode()"
    if type(x) is not Tensor:
        return False, f"the CPU backend takes plain tensors, not {type(x).__name__}"
    runs, reason = can_run_fused(call, "cpu")
    if not runs:
        return runs, reason
    if reason := unsupported_dtype(call.dtype, "cpu"):
        return False, reason
    internal = convolutions.internal_reason(network.topology.spatial_dims, call.dtype)
    if internal and network.backend == "auto":
        return False, internal
    return True, f"PyTorch's operators and in-place sums: {internal}" if internal else "oneDNN writes into kept memory"


def never_runs(network: NetworkSpec, backend: str) -> str:
    """Why a backend can never compute this network, because of its topology or options; "" if it may."""
    if network.structure is None:
        return steps.unsupported(network.topology, network.options)
    return network.structure.unsupported[backend]


def can_run_fused(call: Call, backend: str) -> tuple[bool, str]:
    """Whether a backend can compute `call` in some precision and on some device; if not, why."""
    network, x, structure = call.network, call.x, call.network.structure
    if reason := never_runs(network, backend):
        return False, reason
    if not structure.fits(network, call.modules):
        return False, "a layer was replaced, changed or given hooks, or this is a replica of nn.DataParallel"
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False, "an export needs plain PyTorch operators"
    if network.options["odd_sizes"] and network.sync_group and network.training:
        return False, "processes that share statistics must not differ in their backend, which odd sizes may make them"
    if network.options["odd_sizes"] and any(size % network.topology.multiple for size in x.shape[2:]):
        return False, f"sizes that are not a multiple of {network.topology.multiple} run on the reference"
    if network.training and (reason := training_unsupported(network.options)):
        return False, reason
    weight = next(network.parameters())
    if call.dtype == x.dtype and weight.dtype != x.dtype:
        return False, f"the input is {x.dtype} and the weights are {weight.dtype}"
    if weight.device != x.device:
        return False, f"the input is on {x.device} and the weights are on {weight.device}"
    return True, ""


def forward(network: NetworkSpec, x: Tensor) -> list[Tensor]:
    """Logits of every head of `network`, by the backend that `choose` picks."""
    if network.backend == "reference":
        return reference.forward(network, x)
    call = Call(network, x)
    name, _ = choose(call)
    if name == "reference":
        return reference.forward(network, x)
    if name == "cpu":
        return passes.run(network.structure.plan, packed_weights.of_network(call), x)
    return operators.forward(call, name)
