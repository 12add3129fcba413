"""What a training step by the Triton kernels costs the host before any GPU is asked: Python, with every launch stubbed.

`python benchmarks/host_time.py` prints, by op, the microseconds that a launch takes inside the op (checks, arguments, small
operators on tiny CPU tensors), the whole step, and a captured one beside its launch. Medians over the steps; on a busy
machine take the best of some runs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from support import cuda_stubs
from support.launches import stubbed

import unetpp_fast as uf
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators
from unetpp_fast.kernels import triton_ops

WIDTHS = (2, 2, 2, 2, 2)  # so that what the small operators compute takes no time


def measured(steps: int) -> tuple[dict[str, list[float]], list[float], Counter[str]]:
    """Seconds inside each op, by op and step; seconds of each step; launches of a step."""
    model, x = uf.UNetPlusPlus(1, 1, features=WIDTHS, deep_supervision=True), torch.randn(1, 1, 32, 32)
    spent: dict[str, float] = defaultdict(float)

    def timed(name: str, op):
        def run(*args, **options):
            began = time.perf_counter()
            try:
                return op(*args, **options)
            finally:
                spent[name] += time.perf_counter() - began

        return run

    def step() -> None:
        model.zero_grad()
        outputs = operators.forward(Call(model, x, torch.bfloat16), "triton")
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])

    by_op: dict[str, list[float]] = defaultdict(list)
    whole = []
    with stubbed() as launches:
        step()
        for name in triton_ops.__all__:
            setattr(triton_ops, name, timed(name, getattr(triton_ops, name)))
        for _ in range(steps):
            launches.clear()
            spent.clear()
            began = time.perf_counter()
            step()
            whole.append(time.perf_counter() - began)
            for name, seconds in spent.items():
                by_op[name].append(seconds)
    return by_op, whole, launches


def captured(steps: int) -> list[float]:
    """Seconds of each step that is the replay of a CUDA graph, whose launch is stubbed."""
    model, x = uf.UNetPlusPlus(1, 1, features=WIDTHS, deep_supervision=True), torch.randn(1, 1, 32, 32)
    seconds = []
    with cuda_stubs.stubbed() as stubs:
        step = uf.capture(model, uf.BCEDiceLoss())
        for _ in range(3):
            step(x, x)
        stubs.graphs[0].operators.clear()
        for _ in range(steps):
            model.zero_grad()
            began = time.perf_counter()
            step(x, x)
            seconds.append(time.perf_counter() - began)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    torch.set_num_threads(1)
    steps = parser.parse_args().steps
    by_op, whole, launches = measured(steps)
    kernels = {"norm_backward": ("norm_sums", "norm_apply"), "border_sums": ("border",), "norm_table": ("norm_finalise",)}
    kernels |= {"head": ("head_few", "head")}
    total = 0.0
    for name, seconds in by_op.items():
        count = sum(launches[f"_{kernel}_kernel"] for kernel in kernels.get(name, (name,)))
        median = statistics.median(seconds)
        total += median
        print(f"{name:<16} {count:>4} launches {1e6 * median / count:6.1f} us a launch")
    count = sum(launches.values())
    print(f"{'all ops':<16} {count:>4} launches {1e6 * total / count:6.1f} us a launch")
    print(f"the whole step, with autograd and PyTorch's dispatcher: {1e3 * statistics.median(whole):.1f} ms")
    print(f"a captured step, without its launch: {1e3 * statistics.median(captured(steps)):.2f} ms")


if __name__ == "__main__":
    main()
