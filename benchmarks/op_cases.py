"""Which ops are measured at which shapes: each against PyTorch's equivalent and against the GPU's ceilings.

TFLOP/s and GB/s count the same work and traffic for both (`op_makers.py`). The share of the ceiling is the least time
that an op can take at the matrix and copy rates measured in the same run, divided by its time.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType

import op_makers
import torch
from op_makers import Maps, Op

from unetpp_fast.architecture.precision import TRAINED
from unetpp_fast.benchmarking.case import Case
from unetpp_fast.benchmarking.harness import Outcome, rows_of
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common import timing
from unetpp_fast.execution import acceptance
from unetpp_fast.execution.fused.ops import load_ops
from unetpp_fast.kernels import naive
from unetpp_fast.kernels import tuning as kernel_tuning

INPUTS = [((512, 512), 16), ((96, 96), 16), ((64, 64, 64), 4)]
DEPTH = len(op_makers.WIDTHS) - 1
NAMES = ("eager", *(name for name, entry in IMPLEMENTATIONS.items() if entry.ops))
EVERY, WITH_LOW = range(DEPTH + 1), range(DEPTH)
OPS: dict[str, tuple[Callable[[Maps], Op], Sequence[int]]] = {
    "conv": (op_makers.conv, EVERY),
    "conv-norm": (op_makers.conv_norm, EVERY),
    "conv-phases": (op_makers.conv_phases, WITH_LOW),
    "conv-dgrad": (op_makers.conv_dgrad, EVERY),
    "conv-dgrad-low": (op_makers.conv_dgrad_low, WITH_LOW),
    "conv-wgrad": (op_makers.conv_wgrad, EVERY),
    "conv-wgrad-phases": (op_makers.conv_wgrad_phases, WITH_LOW),
    "norm-finalise": (op_makers.norm_finalise, EVERY),
    "norm-backward": (op_makers.norm_backward, EVERY),
    "act-backward": (op_makers.act_backward, EVERY),
    "pool": (op_makers.pool, WITH_LOW),
    "pool-backward": (op_makers.pool_backward, WITH_LOW),
    "head": (op_makers.head, (0,)),
    "head-backward": (op_makers.head_backward, (0,)),
    "border-sums": (op_makers.border_sums, WITH_LOW),
}


def matrix() -> list[tuple[Case, str]]:
    """Every op at every level of every input, in every precision, by PyTorch and by each backend's kernels."""
    pairs = []
    for (size, batch), dtype, (op, (_, levels)) in itertools.product(INPUTS, TRAINED, OPS.items()):
        for level in levels:
            case = Case("kernel", op, level, None, tuple(axis >> level for axis in size), batch, dtype)
            pairs += [(case, name) for name in NAMES]
    return pairs


def quick() -> list[tuple[Case, str]]:
    """The convolutions of the widest maps."""
    cases = [Case("kernel", op, level, None, (512 >> level,) * 2, 16, "bfloat16")
             for op, level in itertools.product(("conv", "conv-phases", "conv-dgrad", "conv-wgrad"), (0, 1))]  # fmt: skip
    return [(case, name) for case in cases for name in NAMES]


def make(case: Case, device: torch.device, dtype: torch.dtype, batch: int) -> Op:
    """The op of a case."""
    return OPS[case.model][0](Maps(case, device, dtype, batch))


def measure(
    case: Case,
    names: Sequence[str],
    device: torch.device,
    *,
    seconds: float,
    rounds: int | None = None,
    stand_in: bool = False,
    tune: bool = False,
) -> Outcome:
    """As `harness.measure`, for an op. `stand_in`: run the plain ops in place of the kernels."""
    outcome, runs = Outcome(), {}
    if device.type != "cuda" and not stand_in:
        outcome.skipped = dict.fromkeys(names, "kernels need a CUDA device: times in the interpreter mean nothing")
        return outcome
    one = make(case, device, torch.float64, 1)
    exact = one.read_eager(one.eager())
    op = make(case, device, case.torch_dtype, case.batch)
    usual = op.read_eager(op.eager())
    for name in names:
        ops = None if name == "eager" else naive if stand_in else load(name)
        if name != "eager" and ops is None:
            outcome.skipped[name] = f"the {IMPLEMENTATIONS[name].ops} kernels cannot be loaded here"
            continue
        run = op.eager if ops is None else functools.partial(op.ours, ops)
        if tune and ops is not None:
            with kernel_tuning.measuring(lambda launch: _median(launch, device)):
                run()
        op.reset()
        results = (op.read_eager if ops is None else op.read_ours)(run())
        if wrong := _disagreement(exact, usual, results, op.sums, case):
            outcome.wrong[name] = wrong
        else:
            runs[name] = run
    outcome.times = timing.interleaved_times(runs, device, seconds, rounds) if runs else {}
    outcome.rows = rows_of(case, device, outcome.times, {}, op.flop / 1e9)
    tflops, gb_s = ceilings(device, case.torch_dtype, 256 if stand_in else 8192)
    for row in outcome.rows:
        least = max(op.flop / tflops / 1e9, op.moved / gb_s / 1e6)
        row |= {
            "gb_s": op.moved / row["median_ms"] / 1e6, "ceiling_tflops": tflops, "ceiling_gb_s": gb_s, "flop": op.flop,
            "bytes": op.moved, "share_of_ceiling": least / row["median_ms"],
        }  # fmt: skip
    return outcome


def load(name: str) -> ModuleType | None:
    """The ops that an implementation runs, None if they cannot be imported here."""
    try:
        return load_ops(IMPLEMENTATIONS[name].ops)
    except ImportError:
        return None


def _disagreement(exact: list, usual: list, actual: list, sums: tuple[bool, ...], case: Case) -> str:
    """Why a result is wrong, "" if all are right. Sums over the batch are divided by it, since `exact` is of one image."""
    for index, values in enumerate(zip(exact, usual, actual, strict=True)):
        e, u, a = (value.double().flatten() for value in values)
        images = case.batch if index < len(sums) and sums[index] else 1
        if wrong := acceptance.disagreement((e,), (u / images,), (a / images,), case.torch_dtype):
            return f"result {index}: {wrong}"
    return ""


def _median(run: Callable[[], object], device: torch.device) -> float:
    return timing.quantiles(timing.interleaved_times({"": run}, device, rounds=5)[""])["median_ms"]


@functools.lru_cache
def ceilings(device: torch.device, dtype: torch.dtype, side: int) -> tuple[float, float]:
    """TFLOP/s of a square matrix product and GB/s (read and written) of a copy, as measured by the first call."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(16 * side**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = timing.interleaved_times(runs, device, rounds=7)
    medians = {name: timing.quantiles(values)["median_ms"] for name, values in times.items()}
    return 2 * side**3 / medians["product"] / 1e9, 2 * source.numel() / medians["copy"] / 1e6
