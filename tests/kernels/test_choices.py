"""Which candidate an op uses: the first, or the fastest of those that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from unetpp_fast.kernels import tuning as kernel_tuning


@dataclass(frozen=True)
class Config:
    block: int


@pytest.fixture(autouse=True)
def _nothing_measured(monkeypatch):
    monkeypatch.setattr(kernel_tuning, "table", {})
    monkeypatch.setattr(kernel_tuning, "_chosen", {})


def test_the_fastest_candidate_is_used_and_remembered():
    candidates = [Config(1), Config(2), Config(3), Config(4)]
    times = {1: 3.0, 2: 1.0, 4: 2.0}
    ran = []

    def run(config):
        ran.append(config.block)
        if config.block == 3:
            raise LookupError("out of resources")  # Triton has exceptions of its own

    def measure(launch):
        launch()
        return times[ran[-1]]

    assert kernel_tuning.choose("op", (4,), lambda: candidates, run) == Config(1) and not ran
    with kernel_tuning.measuring(measure):
        assert kernel_tuning.choose("op", (4,), lambda: candidates, run) == Config(2)
        assert ran == [1, 2, 3, 4]
        assert kernel_tuning.choose("op", (4,), lambda: candidates, run) == Config(2)
    assert kernel_tuning.choose("op", (4,), lambda: candidates, run) == Config(2) and ran == [1, 2, 3, 4]
    assert kernel_tuning.choose("op", (3,), lambda: candidates[2:], run) == Config(3)  # it is not offered


@pytest.mark.parametrize(("size", "expected"), [(0, 1), (1, 1), (2, 2), (3, 4), (512, 512), (513, 1024)])
def test_sizes_share_buckets(size, expected):
    assert kernel_tuning.bucket(size) == expected
