"""Chooses the backend that computes a forward pass, and says why.

`reference` is plain PyTorch. `triton` runs the whole pass as one operator over level buffers (`fused/`) with the kernels of
`kernels/`; `cuda` does the same with the kernels of `csrc/` for narrow convolutions, `cpu` with those of `csrc/cpu`. A
backend that cannot run says why, and the reference takes over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..architecture.network_spec import NetworkSpec
from ..architecture.options import ENGINES
from ..architecture.precision import unsupported_dtype
from ..architecture.wrappers import network_of
from ..kernels.naive import MOST_CLASSES
from . import agreement, reference
from .built import changed
from .call import Call, Inputs
from .cpu import inference, kept_operands
from .fused import libraries, operators, ops, tuning, verdicts
from .plan import steps

BACKENDS = ("reference", *ENGINES)
CLEARLY = 1.03  # as many times as fast the kernels were measured to be; less is within the noise of a measurement
TOGETHER = "together, at their first training step of this kind"
CPU_KERNELS = libraries.load("cpu")  # whether they are loaded, and if not, why


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

    "auto" takes the kernels for this device if they were measured to be right and faster, otherwise the reference. The first
    call of each size measures, or `unetpp_fast.tune` does so beforehand and, on a GPU, also finds the fastest way of every
    node. Weights may change between calls in any way.
    """
    if not agreement.concerns(call):
        return _alone(call)
    choice = agreement.known(call)
    if choice is None:
        if torch.compiler.is_compiling():
            return "reference", f"a graph that is compiled cannot ask other processes: they decide {TOGETHER}"
        runs, reason = _runs(call)
        asked = [call.network.backend] if call.network.backend != "auto" else None
        return agreement.decide(call, (asked or _kernels(call)) if runs else [], reason, lambda: _alone(call))
    runs, reason = (True, "") if choice[0] == "reference" else can_run(call, choice[0])
    if not runs:
        raise RuntimeError(
            f"the processes that share statistics agreed on the backend {choice[0]!r}, which this one can no longer run: "
            f'{reason}. Set network.backend = "reference" in all of them before this step'
        )
    return choice


def outlook(call: Call) -> tuple[str, str]:
    """What `choose` says, as far as it is known without asking other processes; else "undecided", and when it will be."""
    if not agreement.concerns(call):
        return choose(call)
    runs, reason = _runs(call)
    if not runs:  # then no process takes the kernels
        return "reference", reason
    return agreement.known(call) or ("undecided", f"the processes that share statistics decide {TOGETHER}")


def _alone(call: Call) -> tuple[str, str]:
    """The choice of one process."""
    if call.network.backend == "auto" and call.network.structure is not None and call.x.device.type in ("cpu", "cuda"):
        known = tuning.verdict(call)
        if known and (choice := _by(known))[0] == "reference":
            return choice  # before the layers are looked at, which takes longer than a small layer
    runs, reason = _runs(call)
    if not runs:
        return "reference", reason
    return _measured(call) if call.network.backend == "auto" else (call.network.backend, "asked for")


def _runs(call: Call) -> tuple[bool, str]:
    """Whether the kernels that were asked for, or those for this device, can compute `call`; if not, why."""
    backend = call.network.backend
    if backend == "reference":
        return False, "asked for"
    return can_run(call, backend if backend != "auto" else "cpu" if _is_for_cpu(call.x) else "triton")


def _measured(call: Call) -> tuple[str, str]:
    verdict = tuning.verdict(call)
    if verdict and verdict.get("backend") == "cuda" and not libraries.load("cuda")[0]:
        verdict = None  # the library was there when this was measured
    if verdict is None and tuning.may_measure(call.x):
        verdict = tuning.judge(call, _kernels(call), compute)
    if verdict is None:
        return "reference", "not measured on this device for this size: unetpp_fast.tune(model, x) does"
    return _by(verdict)


def _by(verdict: Mapping) -> tuple[str, str]:
    """What a verdict of `tuning` chooses, and why."""
    if "error" in verdict:
        return "reference", f"the kernels failed when they were tried: {verdict['error']}"
    if not verdict["right"]:
        return "reference", "the kernels gave a wrong result on this device when they were measured"
    name = verdict["backend"] if verdict["ratio"] > CLEARLY else "reference"
    reason = f"measured: the kernels take {1 / verdict['ratio']:.2f} of the reference's time"
    if "float32_ms" in verdict:
        share = verdict["float32_ms"] / min(verdict["fused_ms"], verdict["reference_ms"])
        reason += f"; float32 would take {share:.2f} of the faster one's" if share < 1 else ""
    if verdicts.is_doubtful(verdict):
        reason += ", while other programs used the cores"
    return name, reason


def right_kernels(call: Call) -> str | None:
    """The backend that was measured to be right for `call`, even if the reference was faster; None if there is none."""
    verdict = tuning.verdict(call)
    return verdict["backend"] if verdict and verdict.get("right") and verdict["backend"] in _kernels(call) else None


def _kernels(call: Call) -> list[str]:
    """The backends beside the reference that can compute `call` on its device."""
    if call.x.device.type == "cpu" and not ops.INTERPRETED:
        return ["cpu"]
    return ["triton", *(["cuda"] if can_run_cuda(call)[0] else [])]


def prepare(network: NetworkSpec) -> None:
    """Reads earlier measurements of the GPU that a network was just moved to."""
    device = next(network.parameters()).device
    if device.type == "cuda" and ops.HAS_TRITON:
        verdicts.load(device)


def measured(network: NetworkSpec) -> dict[str, dict]:
    """What was measured of a network's passes on its device, as plain data; `adopt` makes a later process choose alike."""
    if network.structure is None:
        return {}
    return verdicts.beginning_with(next(network.parameters()).device, f"{network.structure.key} ")


def adopt(network: NetworkSpec, found: Mapping[str, Mapping[str, dict]]) -> None:
    """Takes over what `measured` gave to an earlier process, if this one runs on the same device and sources."""
    verdicts.adopt(next(network.parameters()).device, found)


def tune(network: NetworkSpec, x: Tensor, *, training: bool = True, progress: bool = True) -> dict[str, dict]:
    """Measures the kernels on this device for inputs like `x`, once; `backend="auto"` then uses them if they are faster.

    Without it, "auto" compares the default kernels with the reference. On a GPU this first times every way of each
    convolution; then the whole pass is checked against float64 and timed against the reference. On a GPU it takes minutes,
    mostly to compile. Results are kept on disk by device, torch, triton and kernel sources. Run it under `torch.autocast`
    to tune for half precision.

    Args:
        network: a model of this package; it is not changed.
        x: `[N, in_channels, *S]`, of the size and batch to tune for.
        training: measure forward and backward passes too.
        progress: show a progress bar.

    Returns:
        A dictionary by "inference" (and "training") of "backend", the fastest that is right; "right", whether outputs (and
        gradients) are within twice the reference's error against float64; "ratio", the reference's time over the kernels';
        "reference_ms", "fused_ms"; "waited", the share of the time in which threads waited for cores that others used.

    Raises:
        RuntimeError: the kernels cannot run `network(x)` here; the message says why.
    """
    call = Call(*network_of(network, "tune").engine_input(x))
    runs, reason = (can_run_cpu if _is_for_cpu(call.x) else can_run_triton)(call)
    if not runs:
        raise RuntimeError(f"nothing to tune: {reason}")
    return tuning.tune(call, training, progress, _kernels(call), compute)


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
    if network.structure.plan.head_taps == 1 and network.out_channels > MOST_CLASSES:
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
    loaded, reason = libraries.load("cuda")
    if not loaded:
        return False, f"the CUDA kernels are off: {reason}"
    if call.dtype == torch.float32 and torch.backends.cudnn.conv.fp32_precision != "tf32":  # type: ignore[attr-defined]
        return False, 'the CUDA kernels compute float32 as TF32: set torch.backends.cudnn.conv.fp32_precision = "tf32"'
    if torch.cuda.get_device_capability(call.x.device) < (8, 0):
        return False, "the CUDA kernels need a GPU of compute capability 8.0 or later"
    return True, ""


def _is_for_cpu(x: Tensor) -> bool:
    """Whether "auto" considers the CPU backend: not when Triton's interpreter runs on the CPU, nor inside a dispatch mode
    that observes operators."""
    if x.device.type != "cpu" or ops.INTERPRETED:
        return False
    return torch.utils._python_dispatch._get_current_dispatch_mode() is None


def can_run_cpu(call: Call) -> tuple[bool, str]:
    """Whether the CPU kernels can compute `call`; if not, why."""
    x = call.x
    if reason := never_runs(call.network, "cpu"):
        return False, reason
    if x.device.type != "cpu":
        return False, f"the CPU backend needs its input on a CPU, it is on {x.device}"
    runs, reason = can_run_fused(call, "cpu")
    if not runs:
        return runs, reason
    if reason := unsupported_dtype(call.dtype, "cpu"):
        return False, reason
    loaded, reason = CPU_KERNELS
    return loaded, "" if loaded else f"the CPU kernels are off: {reason}"


def can_run(call: Call, backend: str) -> tuple[bool, str]:
    """Whether a backend beside the reference can compute `call` here; if not, why."""
    return {"cpu": can_run_cpu, "triton": can_run_triton, "cuda": can_run_cuda}[backend](call)


def never_runs(network: NetworkSpec, backend: str) -> str:
    """Why a backend can never compute this network, because of its topology or options; "" if it may."""
    if network.structure is None:
        return steps.unsupported(network.topology, network.options)
    return network.structure.unsupported[backend]


def can_run_fused(call: Call, backend: str) -> tuple[bool, str]:
    """Whether a backend can compute `call` in some precision and on some device; if not, why."""
    network, x = call.network, call.x
    if reason := never_runs(network, backend):
        return False, reason
    if reason := changed(network, call.modules):
        return False, reason
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return False, "an export needs plain PyTorch operators"
    if network.options["odd_sizes"] and (reason := _odd_sizes_unsupported(network, x.shape[2:])):
        return False, reason
    if call.drops:
        return False, "dropout in training runs on the reference"
    if not torch.compiler.is_compiling() and (torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack()):
        return False, "tracing and torch.func need plain PyTorch operators"
    if forward_ad._current_level >= 0:
        return False, "forward-mode differentiation needs plain PyTorch operators"
    weight = next(network.parameters())
    if not torch.is_autocast_enabled(x.device.type) and weight.dtype != x.dtype:
        return False, f"the input is {x.dtype} and the weights are {weight.dtype}"
    if weight.device != x.device:
        return False, f"the input is on {x.device} and the weights are on {weight.device}"
    return True, ""


def _odd_sizes_unsupported(network: NetworkSpec, size: Sequence[int]) -> str:
    """Why the kernels cannot compute a network that takes odd sizes at `size`; "" if they can."""
    multiple = network.topology.multiple
    if network.sync_group and network.training:
        return "processes that share statistics must not differ in their backend, which odd sizes may make them"
    if not any(side % multiple for side in size):
        return ""
    if network.options["downsample"] == "stride":
        return f"strided convolutions at sizes that are not a multiple of {multiple} run on the reference"
    return f"the lowest level of {'x'.join(map(str, size))} pixels is empty" if min(size) < multiple else ""


def compute(call: Call, backend: str) -> list[Tensor]:
    """Logits of every head by one backend, which can compute `call`."""
    if backend == "reference":
        return reference.forward(call.network, call.inputs)
    if backend == "cpu" and not call.needs_gradients and not call.in_training and not torch.compiler.is_compiling():
        kept = kept_operands.of_call(call)
        return inference.run(call.structure, kept.composed, kept.values, kept.modes, call.inputs, call.dtype)
    return operators.forward(call, backend)


def forward(network: NetworkSpec, x: Inputs) -> list[Tensor]:
    """Logits of every head of `network`, by the backend that `choose` picks."""
    if network.backend == "reference" and not network.sync_group:
        return reference.forward(network, x)
    call = Call(network, x)
    return compute(call, choose(call)[0])
