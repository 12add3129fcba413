"""Which of its candidates an op uses: the measured one where a measurement is known, the first candidate elsewhere.

An op describes its call by a key of op, dtype and bucketed shape, and offers candidates. Measuring happens only
inside `measuring`, on scratch outputs; what was found is kept in `table`, which `unetpp_fast.tuning` saves and loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Candidate = TypeVar("Candidate")
Measure = Callable[[Callable[[], object]], float]

table: dict[str, str] = {}  # what was measured: how the fastest candidate prints, by key
_chosen: dict[tuple, tuple] = {}  # by key and exact sizes: what stood in the table, and the candidate it means
_measure: Measure | None = None


def bucket(size: int) -> int:
    """Sizes between two powers of two are served by one measurement."""
    return 1 << max(size - 1, 0).bit_length()


def key(op: str, dtype: object, form: str, channels: Sequence[int], sizes: Sequence[int]) -> str:
    """The name of a measurement: channels count exactly, batch and sizes by their bucket."""
    exact, rough = "-".join(map(str, channels)), "x".join(str(bucket(size)) for size in sizes)
    return f"{op} {dtype} {form.strip()} channels {exact} of {rough}"


def choose(
    key: str,
    sizes: Sequence[int],
    candidates: Callable[[], Sequence[Candidate]],
    run: Callable[[Candidate], object],
) -> Candidate:
    """The candidate to use for `key`; inside `measuring`, after timing each once.

    Candidates are known by how they print, which must not depend on sizes that share a bucket.

    sizes: exactly. candidates: makes the list for them, which is asked for once a process and after every measurement.
    run: launches the op by a candidate and leaves no trace. A candidate that fails to launch is passed over.
    """
    if _measure is not None and key not in table:
        times = {}
        for candidate in candidates():
            try:
                times[str(candidate)] = _measure(lambda candidate=candidate: run(candidate))
            except Exception:  # of Triton's own kind or torch's: out of memory, shared memory or registers on this GPU
                continue
        if times:
            table[key] = min(times, key=times.get)
    best, place = table.get(key), (key, *sizes)
    if place not in _chosen or _chosen[place][0] != best:
        offered = candidates()
        found = next((candidate for candidate in offered if str(candidate) == best), offered[0])
        _chosen[place] = best, found
    return _chosen[place][1]


@contextmanager
def measuring(measure: Measure) -> Iterator[None]:
    """Inside, calls with an unknown key time their candidates by `measure(launch)`, in milliseconds."""
    global _measure
    before, _measure = _measure, measure
    try:
        yield
    finally:
        _measure = before
