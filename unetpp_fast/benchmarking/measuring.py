"""How times and memory are taken, and when a result counts as right.

What is compared runs in turns within one loop, so that drift hits all sides. On a GPU times come from CUDA events, with
the L2 cache overwritten before each run. Peak memory on a GPU is the allocator's; on a CPU it is the growth of the
peak resident set of a process of its own, which counts what oneDNN and other runtimes take as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..common.devices import wait

WARM_UP = 2
LEAST_ROUNDS, MOST_ROUNDS = 7, 100
FLUSHED_BYTES = 256 * 2**20  # more than the L2 cache of any GPU
Run = Callable[[], object]


def times_in_turns(
    runs: Mapping[str, Run], device: torch.device, seconds: float = 5.0, rounds: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, the runs taking turns, after a warm-up that does not count.

    Args:
        seconds: how long all rounds together may take; between 7 and 100 rounds whatever it says.
        rounds: exactly so many instead.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _host_clock
    with _without_collections():
        for run in runs.values():
            for _ in range(WARM_UP):
                took = clock(run)
        took = sum(clock(run) for run in runs.values()) / 1e3 if rounds is None and runs else 0.0
        rounds = rounds or int(min(max(seconds / max(took, 1e-9), LEAST_ROUNDS), MOST_ROUNDS))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, run in runs.items():
                times[name].append(clock(run))
    return times


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """No garbage collection inside: it would fall into one side's time."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _host_clock(run: Run) -> float:
    began = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - began)


def _cuda_clock(device: torch.device) -> Callable[[Run], float]:
    scratch = torch.empty(FLUSHED_BYTES, dtype=torch.int8, device=device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def clock(run: Run) -> float:
        scratch.zero_()
        first.record()
        run()
        last.record()
        wait(device)
        return first.elapsed_time(last)

    return clock


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """The median and the 20 % and 80 % quantiles, as a row names them."""
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else (times[0], times[0])
    return {"median_ms": statistics.median(times), "p20_ms": low, "p80_ms": high}


def ratios(times: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """For every other run, the median over the rounds of its time over this one's: above 1, this one is faster."""
    return {
        other: statistics.median(theirs / mine for theirs, mine in zip(values, times[name], strict=True))
        for other, values in times.items()
        if other != name
    }


def graphed(run: Run, device: torch.device) -> Run:
    """`run` as the replay of a CUDA graph, after a warm-up on a stream of its own."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    gc.collect()
    wait(device)
    return torch.cuda.memory_allocated(device)


def allocated_peak(run: Run, device: torch.device, before: int) -> float:
    """Peak MB (10^6 bytes) of tensors on a GPU during `run`, over the `before` bytes held earlier."""
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def resident_peak(build: Callable[[], Run]) -> float:
    """MB (10^6 bytes) by which building and running grow the peak of this process's resident memory.

    What building alone needed for a while does not count, what it leaves does. For a process of its own.

    Raises:
        OSError: this system does not tell.
    """
    before = _resident("VmRSS")
    run = build()
    run()
    _give_back()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    run()
    return max(_resident("VmHWM") - before, 0) / 1e6


def _resident(what: str) -> int:
    _give_back()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status does not tell {what}")


def _give_back() -> None:
    """Freed memory to the system, so that it is not taken for used."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in a Python process of its own with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()
