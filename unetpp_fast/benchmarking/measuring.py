"""Runs as CUDA graphs, and the peak memory of a run.

On a GPU the peak is the allocator's. On a CPU it is the growth of the peak resident set of a separate process, which
includes the memory that oneDNN and other runtimes allocate.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from ..common import cuda_graphs
from ..common.devices import wait
from ..common.timing import Run


def graphed(run: Run, device: torch.device) -> Run:
    """`run` as the replay of a CUDA graph, after a warm-up on a side stream."""
    stream = torch.cuda.Stream(device)
    for _ in range(3):
        cuda_graphs.on_side_stream(stream, run)
    graph = cuda_graphs.capture(run, stream)[0]
    return graph.replay


def allocated(device: torch.device) -> int:
    """Bytes that tensors hold on a GPU."""
    gc.collect()
    wait(device)
    return torch.cuda.memory_allocated(device)


def allocated_peak(run: Run, device: torch.device, before: int) -> float:
    """Peak MB (10^6 bytes) of tensors on a GPU during `run`, above the `before` bytes that were held earlier."""
    wait(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    wait(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def resident_peak(build: Callable[[], Run]) -> float:
    """MB (10^6 bytes) by which building and running raise the peak resident memory of this process.

    Memory that only building needs is not counted; memory that building leaves allocated is. To be called in a fresh
    process (`in_fresh_process`).

    Raises:
        OSError: the system does not report it.
    """
    before = _resident("VmRSS")
    run = build()
    run()
    _return_freed_memory()
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    run()
    run()
    return max(_resident("VmHWM") - before, 0) / 1e6


def _resident(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    _return_freed_memory()
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _return_freed_memory() -> None:
    """Returns freed memory to the system, so that it does not count as used."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def in_fresh_process(function: Callable, *arguments: Any) -> Any:
    """`function(*arguments)` in a new Python process with as many threads as this one; both must be picklable."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)) as pool:
        return pool.submit(function, *arguments).result()
