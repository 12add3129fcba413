"""Interleaved times and what is computed from them."""

from __future__ import annotations

import functools

import torch

from unetpp_fast.common import timing

CPU = torch.device("cpu")


def test_runs_are_interleaved_after_a_warm_up():
    calls = []
    runs = {name: functools.partial(calls.append, name) for name in "ab"}
    times = timing.interleaved_times(runs, CPU, rounds=4)
    assert calls == list("aabb") + list("ab") * 4 and {name: len(mine) for name, mine in times.items()} == {"a": 4, "b": 4}
    calls.clear()
    timing.interleaved_times(runs, CPU, seconds=0.0)
    assert len(calls) == 2 * (timing.WARM_UP + 1 + timing.LEAST_ROUNDS)


def test_runs_of_several_libraries_pause_before_each_other(monkeypatch):
    """Threads that spin after a run take the cores of the next one."""
    seen = []
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: seen.append(seconds))
    runs = {name: functools.partial(seen.append, name) for name in "ab"}
    timing.interleaved_times(runs, CPU, rounds=2)
    assert seen == list("aabb") + [timing.PAUSE, "a", timing.PAUSE, "b"] * 2
    seen.clear()
    timing.interleaved_times({"a": runs["a"]}, CPU, rounds=2)
    assert timing.PAUSE not in seen


def test_ratios_are_taken_round_by_round():
    """A drift that affects both sides of a round leaves the ratio unchanged."""
    times = {"slow": [2.0, 20.0, 200.0], "fast": [1.0, 10.0, 100.0]}
    assert timing.ratios(times, "fast") == {"slow": 2.0} and timing.ratios(times, "slow") == {"fast": 0.5}
    assert timing.quantiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == {"median_ms": 3.5, "p20_ms": 2.0, "p80_ms": 5.0}
