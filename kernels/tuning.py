"""Which of its candidates an op uses: the fastest if they were measured, else the first.

An op describes its call by a key of op, precision, bucketed shape and device, and offers candidates. They are measured only
inside `measuring`, on scratch outputs; the results are kept in `table`, which `execution/fused/tuning.py` saves and loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from .naive import dot_precision

Candidate = TypeVar("Candidate")
Measure = Callable[[Callable[[], object]], float]

table: dict[str, str] = {}  # by key: the string of the candidate measured to be the fastest
_chosen: dict[tuple, tuple] = {}  # by key and exact sizes: the table's string then, and the candidate it means
_measure: Measure | None = None
_measured: Callable[[], object] | None = None  # called after each new entry of `table`


def bucket(size: int) -> int:
    """The power of two up to which sizes share a measurement."""
    return 1 << max(size - 1, 0).bit_length()


def place(device: torch.device) -> str:
    """How a measurement's name ends: by the GPU's name. Meta tensors stand for those on the current GPU."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _place(device)


@lru_cache
def _place(device: torch.device) -> str:
    return f" on {torch.cuda.get_device_name(device) if device.type == 'cuda' else 'the CPU'}"


def key(op: str, like: Tensor, form: str, channels: Sequence[int], sizes: Sequence[int]) -> str:
    """The name of a measurement, with exact channels, bucketed batch and sizes, and the precision and device of `like`."""
    exact, rough = "-".join(map(str, channels)), "x".join(str(bucket(size)) for size in sizes)
    mode = " tf32" if dot_precision(like.dtype) == "tf32" else ""
    return f"{op} {like.dtype}{mode} {form.strip()} channels {exact} of {rough}{place(like.device)}"


def choose(
    key: str,
    sizes: Sequence[int],
    candidates: Callable[[], Sequence[Candidate]],
    run: Callable[[Candidate], object],
) -> Candidate:
    """The candidate to use for `key`; inside `measuring`, after timing each of an unknown key.

    Candidates are identified by their strings, which must not depend on sizes that share a bucket.

    Args:
        sizes: batch and sizes, exactly.
        candidates: makes the list for them; called once per process and after every measurement.
        run: runs the op by a candidate on scratch outputs. A candidate that fails is skipped.
    """
    if _measure is not None and key not in table:
        times = {}
        for candidate in candidates():
            try:
                times[str(candidate)] = _measure(lambda candidate=candidate: run(candidate))
            except Exception:  # Triton's or torch's: out of memory, shared memory or registers on this GPU
                continue
        if times:
            table[key] = min(times, key=times.get)
            if _measured is not None:
                _measured()
    best, place = table.get(key), (key, *sizes)
    if place not in _chosen or _chosen[place][0] != best:
        offered = candidates()
        chosen = next((candidate for candidate in offered if str(candidate) == best), offered[0])
        _chosen[place] = best, chosen
    return _chosen[place][1]


@contextmanager
def measuring(measure: Measure, measured: Callable[[], object] | None = None) -> Iterator[None]:
    """Inside, calls with an unknown key time their candidates by `measure(launch)`, which returns milliseconds.

    `measured()` is called after each key, so that a run that is stopped keeps the keys before.
    """
    global _measure, _measured
    before = _measure, _measured
    _measure, _measured = measure, measured
    try:
        yield
    finally:
        _measure, _measured = before
