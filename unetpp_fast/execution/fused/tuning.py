"""Measures the kernels once on the user's GPU or CPU; `verdicts.py` keeps the results.

`tune(model, x)` times the candidates of every convolution of a pass, checks the fused result against float64 and times the
whole pass against the reference. `backend="auto"` uses the kernels if they were measured to be right and faster.
"""

from __future__ import annotations

import copy
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...architecture.network_spec import NetworkSpec
from ...common.devices import wait
from ...common.progress import progress_bar
from ...common.waiting import computed_and_waited, share_waited
from ...kernels import tuning as kernel_tuning
from ...kernels.naive import dot_precision
from .. import reference
from ..acceptance import as_vector, disagreement, farther_off
from ..batch_statistics import copy_alone
from ..call import Call
from . import ops, verdicts

ROUNDS = 15
NEVER_MS = 1e9  # the reference's time if it does not fit into memory
SLOW_MS = 300.0  # on a CPU two runs of a slower pass are enough
MEASURED_PIXELS = 2**18  # of an image on a CPU; the verdict on larger ones is that on a part of them
CHECKED_PIXELS = 2**12  # of an image on a CPU, where float64 is slow: enough for both kinds of convolution
CLOSE = 0.75  # on a CPU, times that are nearer to each other are taken twice, and the shorter ones count
DRAWS = 8  # of noise, with one of which gradients must be right
JUDGEMENTS = 3  # of a size that runs out of memory: other tensors may be gone at the next call
Compute = Callable[[Call, str], list[Tensor]]
_failures: dict[str, int] = {}  # judgements that ran out of memory, by setting and key


def verdict(call: Call) -> dict | None:
    """The verdict on such a pass on this device, or None; keys "right" and "ratio" (above 1: faster than the reference).

    While a graph is compiled, the latest verdict on such a pass at any size: sizes may be symbols.
    """
    if torch.compiler.is_compiling():
        return verdicts.latest(call.x.device, pass_key(call))
    return recall(call.x, _key(call))


def recall(x: Tensor, key: str) -> dict | None:
    """What was measured on the device of `x` under a key; None too if it is doubtful and this call may measure again."""
    known, again = verdicts.recall(x.device, key)
    return None if again and may_measure(x) else known


def pass_key(call: Call) -> str:
    """What passes of any size on a device differ in: also in whether batch norms take statistics of the batch, as they may
    without gradients and may not with them."""
    kind = f"{'training' if call.needs_gradients else 'inference'}{'-batch-statistics' if call.in_training else ''}"
    return f"{call.structure.key} {call.dtype} {kind}"


def _key(call: Call) -> str:
    """With the size, and whether float32 is multiplied as TF32, which a graph that is being compiled cannot ask for."""
    return f"{pass_key(call)} {'tf32-' if dot_precision(call.dtype) == 'tf32' else ''}{sizes_of(call.x)}"


def sizes_of(x: Tensor) -> str:
    """Images and pixels of `[N, C, *S]`, one word for sizes that are measured once."""
    return "x".join(str(kernel_tuning.bucket(size)) for size in (x.shape[0], *x.shape[2:]))


def milliseconds(run: Callable[[], object], device: torch.device, rounds: int = ROUNDS) -> float:
    """Median time of `run` after two warm-up calls; of a slow one on a CPU the faster of these two."""
    warm_up = [_once(run, device) for _ in range(2)]
    if device.type == "cpu" and min(warm_up) > SLOW_MS:
        return min(warm_up)
    return statistics.median(_once(run, device) for _ in range(rounds))


def _once(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    run()
    wait(device)
    return 1e3 * (time.perf_counter() - began)


def tune(call: Call, training: bool, progress: bool, kernels: Sequence[str], compute: Compute) -> dict[str, dict]:
    """See `dispatch.tune`; `kernels`: the backends to compare with the reference."""
    device = call.x.device
    verdicts.load(device)
    found = {}
    for name in ("inference", "training")[: 1 + training]:
        with torch.set_grad_enabled(name == "training"):
            measured = _copy(call, name == "training")
            if device.type == "cuda":
                for backend in kernels:
                    _time_candidates(measured, backend, name, progress, compute)
            found[name] = _judge(measured, kernels, compute)
            verdicts.keep(device, _key(measured), found[name])
            verdicts.save(device)
    return found


def may_measure(x: Tensor) -> bool:
    """Whether a call may stop to measure: on a GPU or CPU, outside a graph, unless `UNETPP_FAST_MEASURE` is 0."""
    return (
        (x.is_cuda or (x.device.type == "cpu" and not ops.INTERPRETED))
        and x.numel() > 0
        and os.environ.get("UNETPP_FAST_MEASURE") != "0"
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and torch.utils._python_dispatch._get_current_dispatch_mode() is None  # nobody counts or fakes what runs
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def judge(call: Call, kernels: Sequence[str], compute: Compute) -> dict:
    """Checks and times the pass that is about to run, once per device and size; a failure counts against the kernels."""
    x, size = call.x, "x".join(map(str, call.x.shape[2:]))
    if "triton" in kernels:  # which are compiled first
        print(
            f"unetpp_fast: comparing its kernels with the reference for {x.shape[0]} image(s) of {size} pixels in"
            f" {call.dtype}, once on this device (UNETPP_FAST_MEASURE=0 skips this)",
            file=sys.stderr,
        )
    try:
        before, rounds = verdicts.recall(x.device, _key(call))[0], 5 if x.is_cuda else 3
        verdict = _judge(_copy(call, call.network.training), kernels, compute, rounds, before)
    except Exception as error:  # whatever it is, the reference takes over
        verdict = {"error": f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"}
        place = f"{verdicts.setting(x.device)}|{_key(call)}"
        if isinstance(error, torch.OutOfMemoryError):
            _failures[place] = _failures.get(place, 0) + 1
            if _failures[place] < JUDGEMENTS:
                return verdict
    return verdicts.remember(x.device, _key(call), verdict)


def _copy(call: Call, training: bool) -> Call:
    """The same pass of a copy of the network that exchanges nothing with other processes; on a CPU of part of the images."""
    inputs = [x.detach() for x in call.inputs]
    if call.x.device.type == "cpu":
        inputs = measured_part(inputs, call.network.topology.multiple)
    return Call(copy_alone(call.network).train(training), inputs, call.dtype)


def measured_part(inputs: list[Tensor], multiple: int) -> list[Tensor]:
    """What is measured on a CPU in place of these images, or maps of an encoder, if they are large."""
    inputs = _part(inputs, MEASURED_PIXELS, multiple)
    images = max(1, 2 * MEASURED_PIXELS // inputs[0].shape[2:].numel())
    return [x[:images] for x in inputs]


def _part(inputs: list[Tensor], pixels: int, multiple: int) -> list[Tensor]:
    """The leading part of images, of at most so many pixels each, or the smallest that a network takes; of the maps of an
    encoder, the same part of each."""
    while (size := inputs[0].shape[2:]).numel() > pixels and max(size) >= 2 * multiple:
        axis = max(range(len(size)), key=lambda axis: size[axis])
        kept = size[axis] // 2 // multiple * multiple + size[axis] % multiple  # an odd size stays odd
        inputs = [x.narrow(axis + 2, 0, x.shape[axis + 2] * kept // size[axis]) for x in inputs]
    return inputs


def _by(backend: str, dtype: torch.dtype, compute: Compute) -> Callable[[NetworkSpec, Tensor], list[Tensor]]:
    return lambda network, inputs: compute(Call(network, inputs, dtype), backend)


def _time_candidates(call: Call, backend: str, name: str, progress: bool, compute: Compute) -> None:
    description = f"tuning {name}, {backend}"
    with progress_bar(desc=description, unit="candidate", disable=None if progress else True) as bar:

        def measure(launch: Callable[[], object]) -> float:
            bar.update()
            return milliseconds(launch, call.x.device)

        with kernel_tuning.measuring(measure, lambda: verdicts.save_if_possible(call.x.device)):
            _run(_by(backend, call.dtype, compute), call.network, call.inputs, call.needs_gradients)


def _own(network: NetworkSpec) -> Any:
    return copy.deepcopy(network)


def _judge(
    call: Call, kernels: Sequence[str], compute: Compute, rounds: int = ROUNDS, before: Mapping | None = None
) -> dict:
    """The verdict on the fastest backend that is right; one that fails is skipped, unless all fail. before: a doubtful one,
    of another process; what it found to be right or wrong is not checked again."""
    device, training = call.x.device, call.needs_gradients
    checked = _checked(call.inputs, call.network.topology.multiple)

    def took(forward: Callable) -> float:
        return milliseconds(lambda: _run(forward, call.network, call.inputs, training), device, rounds)

    found: list[dict[str, Any]] = []
    failed: Exception | None = None
    for backend in kernels:
        try:
            forward = _by(backend, call.dtype, compute)
            known = before is not None and before.get("backend") == backend
            right = before["right"] if known else _is_right(call.network, checked, call.dtype, training, forward)
            began = computed_and_waited()
            try:
                reference_ms = took(reference.forward)
            except torch.OutOfMemoryError:  # only the kernels, which need less memory, are left
                reference_ms = NEVER_MS
            fused_ms = took(forward)
            if device.type == "cpu" and CLOSE < fused_ms / reference_ms < 1 / CLOSE:  # other programs may have slowed one
                reference_ms, fused_ms = min(reference_ms, took(reference.forward)), min(fused_ms, took(forward))
        except Exception as error:
            failed = error
            continue
        times = {"reference_ms": reference_ms, "fused_ms": fused_ms, "waited": round(share_waited(began), 3)}
        found.append({"backend": backend, "right": right, "ratio": reference_ms / fused_ms, **times})
    if not found:
        raise failed
    best = max(found, key=lambda verdict: verdict["ratio"] if verdict["right"] else -1.0)
    if device.type == "cpu" and call.dtype != torch.float32:  # which may be faster there
        single = Call(_own(call.network).float(), [x.float() for x in call.inputs], torch.float32)
        forward = _by(best["backend"], torch.float32, compute)
        with torch.autocast("cpu", enabled=False):
            best["float32_ms"] = milliseconds(lambda: _run(forward, single.network, single.inputs, training), device, rounds)
    return best


def _run(forward: Callable, network: NetworkSpec, inputs: list[Tensor], training: bool) -> list[Tensor]:
    """The outputs of a pass as one vector and, in training, the gradients of all parameters, and of the maps of an encoder,
    as another."""
    given = [x.detach().requires_grad_() for x in inputs] if training and network.topology.given else []
    with torch.set_grad_enabled(training):
        outputs = forward(network, given or inputs)
        results = [outputs]
        if training:
            loss = sum(output.to(torch.promote_types(output.dtype, torch.float32)).square().mean() for output in outputs)
            learned = [parameter for parameter in network.parameters() if parameter.requires_grad] + given
            results += [torch.autograd.grad(loss, learned)] if learned else []
    return [as_vector(tensors) for tensors in results]


def _checked(inputs: list[Tensor], multiple: int) -> list[list[Tensor]]:
    """What to check a pass over these inputs on, the first that float64 has memory for. On a GPU all images, because other
    kernels may serve fewer of them; on a CPU, where float64 is slow, a part of two."""
    if inputs[0].device.type == "cpu":
        return [_part([x[:2] for x in inputs], CHECKED_PIXELS, multiple)]
    return [inputs, *([x[:count] for x in inputs] for count in (8, 2) if count < inputs[0].shape[0])]


def _is_right(
    network: NetworkSpec, checked: list[list[Tensor]], dtype: torch.dtype, training: bool, kernels: Callable
) -> bool:
    """Whether `acceptance.disagreement` accepts the results for the first input that fits in memory: outputs always,
    gradients for the images as they are or with one of a few draws of noise. A single ReLU or maximum that falls the other
    way can take gradients out of the bounds; another draw has others, while a wrong kernel is wrong in all."""
    noise = torch.Generator().manual_seed(0)
    for draw in range(DRAWS if training else 1):
        drawn = [[_noisy(x, noise) for x in inputs] for inputs in checked] if draw else checked
        exact, usual, actual = _results(network, drawn, training, kernels)
        if disagreement(exact[:1], usual[:1], actual[:1], dtype):
            return False
        if not disagreement(exact, usual, actual, dtype):
            return True
    return False


def _noisy(x: Tensor, noise: torch.Generator) -> Tensor:
    return x + torch.randn(x.shape, generator=noise).to(x) * (x.std(correction=0) / 100)


def _results(network: NetworkSpec, checked: list[list[Tensor]], training: bool, kernels: Callable) -> list[list[Tensor]]:
    """For the first input that fits in memory what `_run` gives in float64, by PyTorch and by `kernels`; of PyTorch's two
    layouts the one that is farther off."""
    for inputs in checked:
        layouts = (torch.contiguous_format, torch.channels_last if inputs[0].ndim == 4 else torch.channels_last_3d)
        try:
            with torch.autocast(inputs[0].device.type, enabled=False):
                wide = [x.double() for x in inputs]
                exact = _run(reference.forward, _own(network).double(), wide, training)
            usual = []
            for layout in layouts:
                laid_out = _own(network).to(memory_format=layout)
                images = [x.to(memory_format=layout) for x in inputs]
                usual.append(_run(reference.forward, laid_out, images, training))
            break
        except torch.OutOfMemoryError:
            if inputs is checked[-1]:
                raise
    return [exact, farther_off(exact, *usual), _run(kernels, copy.deepcopy(network), inputs, training)]
