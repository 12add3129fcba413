"""Which configuration a launcher uses: the measured one where a measurement is known, the first candidate elsewhere.

A launcher describes its call by a key of op, dtype and bucketed shape, and offers candidates. Measuring happens only
inside `measuring`, on scratch outputs; what was found is kept in `table`, which `unetpp_fast.tuning` saves and loads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

Config = TypeVar("Config")
Measure = Callable[[Callable[[], object]], float]

table: dict[str, list[int]] = {}
_measure: Measure | None = None


def bucket(size: int) -> int:
    """Sizes between two powers of two are served by one measurement."""
    return 1 << max(size - 1, 0).bit_length()


def key(op: str, dtype: object, form: str, channels: Sequence[int], sizes: Sequence[int]) -> str:
    """The name of a measurement: channels count exactly, batch and sizes by their bucket."""
    exact, rough = "-".join(map(str, channels)), "x".join(str(bucket(size)) for size in sizes)
    return f"{op} {dtype} {form.strip()} channels {exact} of {rough}"


def choose(key: str, candidates: Sequence[Config], run: Callable[[Config], object]) -> Config:
    """The candidate to use for `key`; inside `measuring`, after timing each once.

    run: launches the op with a configuration and leaves no trace. A candidate that fails to launch is passed over.
    """
    if _measure is not None and key not in table:
        times = {}
        for index, candidate in enumerate(candidates):
            try:
                times[index] = _measure(lambda candidate=candidate: run(candidate))
            except RuntimeError:  # out of shared memory or registers on this GPU
                continue
        if times:
            table[key] = list(vars(candidates[min(times, key=times.get)]).values())
    known = table.get(key)
    if known is None:
        return candidates[0]
    return next((candidate for candidate in candidates if list(vars(candidate).values()) == known), candidates[0])


@contextmanager
def measuring(measure: Measure) -> Iterator[None]:
    """Inside, calls with an unknown key time their candidates by `measure(launch)`, in milliseconds."""
    global _measure
    before, _measure = _measure, measure
    try:
        yield
    finally:
        _measure = before
