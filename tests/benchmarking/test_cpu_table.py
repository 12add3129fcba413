"""The table of the CPU kernels: its parts, what it prints of rows, and the checks beside it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from support.rows import row

import unetpp_fast as uf
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.source_hash import source_hash

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import cpu_checks
import cpu_table

needs_kernels = pytest.mark.skipif(not dispatch.CPU_KERNELS[0], reason=f"the CPU kernels are off: {dispatch.CPU_KERNELS[1]}")


def network() -> uf.Network:
    torch.manual_seed(0)
    return uf.UNetPlusPlus(1, 1, features=(2, 3), norm=None, upsample="nearest", deep_supervision=True).eval()


def test_the_parts():
    names = {*cpu_table.parts(), *cpu_table.checks()}
    for up in ("nearest", "deconv"):
        sizes = {f"{up}-{size}x{batch}" for size in (96, 224, 256) for batch in (1, 8)}
        steps = {f"{kind}-{up}-{case}" for kind in ("training", "memory-training") for case in ("96x16", "512x1")}
        assert sizes | steps | {f"{up}-float32", f"{up}-bfloat16", f"memory-{up}-float32", f"busy-{up}"} <= names


def test_the_table_shows_times_ratios_errors_and_stale_rows():
    name = "unet++-nearest"
    ours = row(model=name, impl="fused-cpu", median_ms=10.0, ratio_to={"mnn": 1.5}, error=1e-6)
    theirs = row(model=name, impl="mnn", median_ms=15.0, p80_ms=16.0, ratio_to={}, error=2e-4, source_hash="0" * 16)
    found = {"sweep-nearest": {"values": {f"{n}": 1.0 + n for n in range(9)}, "source_hash": source_hash()}}
    text = cpu_table.table([ours, theirs], found)
    assert f"| inference, {name} 512x512, batch 1, float32 | 10 ms, 1e-06 |" in text
    assert "| 15 ms (1.50x), 2e-04 † |" in text and text.count("† |") == 1
    assert "† is of older sources." in text and "†" not in cpu_table.table([ours], found)
    older = {"sweep-nearest": {"values": {"0": 1.0}, "source_hash": "0" * 16}}
    assert "† is of older sources." in cpu_table.table([ours], older)
    assert "sweep-nearest (the least 3 of 9): 0 1.00, 1 2.00, 2 3.00" in text


@needs_kernels
def test_the_checks_run(monkeypatch):
    monkeypatch.setattr(cpu_checks, "BUSY_SIZE", 16)
    monkeypatch.setattr(cpu_checks, "SWEEP", [(16, 1)])
    monkeypatch.setattr(cpu_checks, "LARGEST", (16, 2))
    monkeypatch.setattr(cpu_checks, "LAYERS", ((4, 4, 16),))
    monkeypatch.setattr(cpu_checks, "ROUNDS_OF_PEAK", 1000)
    before = torch.get_num_threads()
    assert set(cpu_checks.busy(network(), 1)) == {"ours", "eager", "ratio"}
    assert list(cpu_checks.sweep(network(), 2)) == [
        "16x16 batch 1, 2 threads", "16x16 batch 2, 2 threads", "16x16 batch 1, 1 threads",
    ]  # fmt: skip
    assert all(share > 0 for share in cpu_checks.peak(1).values())
    assert torch.get_num_threads() == before
