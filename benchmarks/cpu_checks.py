"""What the rows of `cpu_table.py` do not say: a busy neighbour, every size against eager, the share of the CPU's peak."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch

from unetpp_fast.benchmarking.case import with_backend
from unetpp_fast.common import timing
from unetpp_fast.deployment.optimized import optimize
from unetpp_fast.execution.fused.ops import load_ops
from unetpp_fast.models.network import Network

CPU = torch.device("cpu")
BUSY_SIZE = 256
SWEEP = [(size, batch) for size in (16, 32, 64, 96, 128) for batch in (1, 4, 16)] + [(224, 1), (224, 4), (256, 1), (512, 1)]
LARGEST = (1024, 1)  # with all threads only
LAYERS = ((64, 64, 256), (192, 64, 256), (128, 128, 128), (256, 256, 64), (512, 512, 32))  # inputs, outputs, pixels per axis
ROUNDS_OF_PEAK = 3_000_000  # of 12 fused products


@contextlib.contextmanager
def busy_process() -> Iterator[Callable[[bool], None]]:
    """A function that starts and stops another process, which computes without end on one core."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield lambda runs: os.kill(process.pid, signal.SIGCONT if runs else signal.SIGSTOP)
    finally:
        process.kill()
        process.wait()


def busy(network: Network, rounds: int) -> dict[str, float]:
    """How much one other busy process slows down inference at 256x256: ours, eager's channels-last, and their ratio."""
    x = torch.randn(1, 1, BUSY_SIZE, BUSY_SIZE)
    eager = with_backend(network, "reference").eval().to(memory_format=torch.channels_last)
    ours, image = (
        optimize(with_backend(network, "cpu"), dtype=torch.float32),
        x.contiguous(memory_format=torch.channels_last),
    )
    runs = {"ours": lambda: ours(x), "eager": lambda: eager(image)}
    times: dict[tuple[str, bool], list[float]] = {}
    with torch.no_grad(), busy_process() as neighbour:
        for index in range(rounds + 1):
            for occupied in (False, True):
                neighbour(occupied)
                time.sleep(0.02)
                for name, run in runs.items():
                    began = time.perf_counter()
                    run()
                    if index:  # the first round warms up
                        times.setdefault((name, occupied), []).append(time.perf_counter() - began)
    slower = {name: statistics.median(times[name, True]) / statistics.median(times[name, False]) for name in runs}
    return {**slower, "ratio": slower["ours"] / slower["eager"]}


def sweep(network: Network, threads: int) -> dict[str, float]:
    """Speed of `backend="auto"` against eager PyTorch, for inference of every size and batch by all threads and by one."""
    found, before = {}, torch.get_num_threads()
    auto, eager = with_backend(network, "auto").eval(), with_backend(network, "reference").eval()
    try:
        for count in dict.fromkeys((threads, 1)):
            torch.set_num_threads(count)
            for size, batch in [*SWEEP, *([LARGEST] if count == threads else [])]:
                x = torch.randn(batch, 1, size, size)
                with torch.no_grad():
                    runs = {"auto": lambda x=x: auto(x), "eager": lambda x=x: eager(x)}
                    times = timing.interleaved_times(runs, CPU, 1.0, 3 if size >= 512 else None)
                found[f"{size}x{size} batch {batch}, {count} threads"] = timing.ratios(times, "auto")["eager"]
    finally:
        torch.set_num_threads(before)
    return found


def peak(rounds: int) -> dict[str, float]:
    """Of convolutions on one thread: operations of a direct convolution per second, as a share of the peak of fused products
    that is measured beside them."""
    ops, before = load_ops("cpu"), torch.get_num_threads()
    torch.set_num_threads(1)
    lanes = torch.ops.unetpp_fast_cpu.lanes()
    found = {}
    try:
        for inputs, outputs, size in LAYERS:
            a, out = torch.randn(1, 1, size, size, inputs), torch.empty(1, 1, size, size, outputs)
            weight = torch.randn(9, inputs, outputs)
            runs = {
                "conv": lambda out=out, a=a, weight=weight: ops.conv(out, a, weight, axes=2),
                "peak": lambda: torch.ops.unetpp_fast_cpu.fused_products(ROUNDS_OF_PEAK),
            }
            times = timing.interleaved_times(runs, CPU, rounds=rounds)
            conv_flop, peak_flop = 2 * 9 * inputs * outputs * size * size, 2 * 12 * lanes * ROUNDS_OF_PEAK
            shares = [conv_flop / conv / (peak_flop / most) for conv, most in zip(*times.values(), strict=True)]
            found[f"{inputs} to {outputs} channels, {size}x{size}"] = statistics.median(shares)
    finally:
        torch.set_num_threads(before)
    return found
