"""Times of runs that are compared: interleaved in one loop, so that drift of the machine affects all of them alike.

On a GPU times come from CUDA events, with the L2 cache overwritten before each run. On a CPU each run begins after a pause:
threads of the library before it wait for more work by spinning, OpenVINO's for up to 50 ms, and would take its cores.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from .devices import wait

WARM_UP = 2
PAUSE = 0.1  # seconds; of several runs on a CPU
LEAST_ROUNDS, MOST_ROUNDS = 7, 100
FLUSHED_BYTES = 256 * 2**20  # more than the L2 cache of any GPU
Run = Callable[[], object]


def interleaved_times(
    runs: Mapping[str, Run], device: torch.device, seconds: float = 5.0, rounds: int | None = None
) -> dict[str, list[float]]:
    """Milliseconds of each run in each round, after a warm-up that does not count.

    Args:
        seconds: time for all rounds together; there are at least 7 and at most 100.
        rounds: the exact number of rounds, in place of `seconds`.
    """
    clock = _cuda_clock(device) if device.type == "cuda" else _host_clock
    with _garbage_collection_off():
        for run in runs.values():
            for _ in range(WARM_UP):
                clock(run)
        took = sum(clock(run) for run in runs.values()) / 1e3 if rounds is None and runs else 0.0
        rounds = rounds or int(min(max(seconds / max(took, 1e-9), LEAST_ROUNDS), MOST_ROUNDS))
        times: dict[str, list[float]] = {name: [] for name in runs}
        pause = PAUSE if device.type == "cpu" and len(runs) > 1 else 0.0
        for _ in range(rounds):
            for name, run in runs.items():
                time.sleep(pause)
                times[name].append(clock(run))
    return times


@contextlib.contextmanager
def _garbage_collection_off() -> Iterator[None]:
    """No garbage collection inside: it would count as the time of a single run."""
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
    """The median and the 20 % and 80 % quantiles, under the names of a row's fields."""
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive") if len(times) > 1 else (times[0], times[0])
    return {"median_ms": statistics.median(times), "p20_ms": low, "p80_ms": high}


def ratios(times: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """For every other run, the median over the rounds of its time divided by this one's: above 1, this one is faster."""
    return {
        other: statistics.median(theirs / mine for theirs, mine in zip(values, times[name], strict=True))
        for other, values in times.items()
        if other != name
    }
