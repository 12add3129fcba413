"""Which ops are measured at which shapes, and how: each against PyTorch's equivalent, and against what the GPU can do.

TFLOP/s and GB/s count the same work and traffic on both sides (`op_makers.py`). The share of the ceiling is the least
time that an op can take at the matrix and copy rates measured in the same run, over the time it takes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from types import ModuleType

import op_makers
import torch
from op_makers import Maps, Op

from unetpp_fast.benchmarking import measuring
from unetpp_fast.benchmarking.harness import Case, Outcome, rows_of
from unetpp_fast.benchmarking.records import DTYPES
from unetpp_fast.execution import acceptance
from unetpp_fast.execution.fused.ops import load_ops
from unetpp_fast.kernels import naive
from unetpp_fast.kernels import tuning as kernel_tuning

INPUTS = [((512, 512), 16), ((96, 96), 16), ((64, 64, 64), 4)]
DEPTH = len(op_makers.WIDTHS) - 1
NAMES = ("eager", "fused-triton", "fused-cuda")
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
    found = []
    for (size, batch), dtype, (op, (_, levels)) in itertools.product(INPUTS, DTYPES, OPS.items()):
        for level in levels:
            case = Case("kernel", op, level, None, tuple(axis >> level for axis in size), batch, dtype)
            found += [(case, name) for name in NAMES]
    return found


def quick() -> list[tuple[Case, str]]:
    """The convolutions of the widest maps."""
    cases = [Case("kernel", op, level, None, (512 >> level,) * 2, 16, "bfloat16")
             for op, level in itertools.product(("conv", "conv-phases", "conv-dgrad", "conv-wgrad"), (0, 1))]  # fmt: skip
    return [(case, name) for case in cases for name in NAMES]


def make(case: Case, device: torch.device, dtype: torch.dtype, batch: int) -> Op:
    """An op of a case."""
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
    """As `bench.measure`, of an op. `stand_in`: the plain ops in place of kernels."""
    outcome, runs = Outcome(), {}
    if device.type != "cuda" and not stand_in:
        outcome.skipped = dict.fromkeys(names, "kernels need a CUDA device: the interpreter's times mean nothing")
        return outcome
    one = make(case, device, torch.float64, 1)
    exact = one.read_eager(one.eager())
    op = make(case, device, case.torch_dtype, case.batch)
    usual = op.read_eager(op.eager())
    for name in names:
        ops = None if name == "eager" else naive if stand_in else load(name)
        if name != "eager" and ops is None:
            outcome.skipped[name] = f"this version has no {name.partition('-')[2]} kernels"
            continue
        run = op.eager if ops is None else functools.partial(op.ours, ops)
        if tune and ops is not None:
            with kernel_tuning.measuring(lambda launch: _median(launch, device)):
                run()
        op.reset()
        found = (op.read_eager if ops is None else op.read_ours)(run())
        wrong = _disagreement(exact, usual, found, op.sums, case)
        if wrong:
            outcome.wrong[name] = wrong
        else:
            runs[name] = run
    outcome.times = measuring.times_in_turns(runs, device, seconds, rounds) if runs else {}
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
    """The ops that an implementation runs, None where this version does not have them."""
    try:
        return load_ops(name.partition("-")[2])
    except (KeyError, ImportError):
        return None


def _disagreement(exact: list, usual: list, found: list, sums: tuple[bool, ...], case: Case) -> str:
    """Each result by itself; sums over the batch are so many times those of one image."""
    for index, values in enumerate(zip(exact, usual, found, strict=True)):
        e, u, f = (value.double().flatten() for value in values)
        images = case.batch if index < len(sums) and sums[index] else 1
        if wrong := acceptance.disagreement((e,), (u / images,), (f / images,), case.torch_dtype):
            return f"result {index}: {wrong}"
    return ""


def _median(run: Callable[[], object], device: torch.device) -> float:
    return measuring.quantiles(measuring.times_in_turns({"": run}, device, rounds=5)[""])["median_ms"]


@functools.lru_cache
def ceilings(device: torch.device, dtype: torch.dtype, side: int) -> tuple[float, float]:
    """TFLOP/s of a square matrix product and GB/s (read and written) of a copy, measured now."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(16 * side**2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    runs = {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}
    times = measuring.times_in_turns(runs, device, rounds=7)
    medians = {name: measuring.quantiles(values)["median_ms"] for name, values in times.items()}
    return 2 * side**3 / medians["product"] / 1e9, 2 * source.numel() / medians["copy"] / 1e6
