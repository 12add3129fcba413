"""The table of networks over encoders, on a small stand-in for smp's."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from support import cpu_kernels
from support.encoders import encoded
from support.rows import row

from unetpp_fast.benchmarking import records
from unetpp_fast.common.errors import InputError

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import cpu_table
import encoder_table


def module(encoder: str) -> torch.nn.Module:
    model = encoded()
    model.backend, model.out_channels = "reference", 2
    return model.eval()


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(encoder_table, "smp_module", module)
    monkeypatch.setattr(encoder_table, "ALTERNATIVES", ("eager-channels-last",))
    monkeypatch.setattr(encoder_table, "SIZES", (16,))
    monkeypatch.setattr(encoder_table, "ENCODERS", ("resnet34",))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    (tmp_path / "checks").mkdir()


@cpu_kernels.needs_library()
def test_parts_are_measured_recorded_and_printed(small, monkeypatch, capsys):
    monkeypatch.setattr(encoder_table, "convert", lambda model: module(""))
    monkeypatch.setattr(encoder_table, "own_network", lambda: encoded(deep_supervision=True).eval())
    monkeypatch.setattr(encoder_table, "PRUNED_CASE", dataclasses.replace(encoder_table.PRUNED_CASE, size=(16, 24)))
    monkeypatch.setattr(sys, "argv", ["encoder_table.py", "--rounds", "1"])
    cpu_table.command(encoder_table.__doc__, encoder_table.parts(), encoder_table.checks(), encoder_table.table)
    rows = records.read(next(records.RESULTS.glob("*.json")))
    assert {one["impl"] for one in rows} == {"fused", "eager-channels-last"}
    smp = [one for one in rows if one["model"] == "smp-unet++-resnet34"]
    assert len(smp) == 2 and all(one["error"] < 1e-5 for one in smp)
    pruned = {(one["level"], one["impl"]): one for one in rows if one["model"] == "unet++-resnet34"}
    assert set(pruned) == {(level, impl) for level in (1, 2) for impl in ("fused", "eager-channels-last")}
    gflop = encoded(deep_supervision=True).prune(1).gflop((16, 24))
    assert pruned[1, "fused"]["tflops"] * pruned[1, "fused"]["median_ms"] == pytest.approx(gflop)
    printed = capsys.readouterr().out
    assert "| inference, smp-unet++-resnet34 16x16, batch 1, float32 | " in printed
    assert "| `prune(1)` | " in printed and "| `prune(2)` | " in printed
    share = float(printed.split("kept-resnet34-16: ")[1].split("share ")[1].split("\n")[0])
    assert 0 < share < 1


def test_the_table_compares_with_ours_and_leaves_other_checks():
    case = {"model": "smp-unet++-resnet50", "mode": "accurate", "size": [256, 256]}
    ours = row(impl="fused", median_ms=10.0, ratio_to={"compile": 1.5}, **case)
    theirs = row(impl="compile", median_ms=15.0, p80_ms=16.0, ratio_to={}, **case)
    text = encoder_table.table([ours, theirs], {"peak": {"values": {}}})
    assert "| inference, smp-unet++-resnet50 256x256, batch 1, float32 | 10 ms |  | 15 ms (1.50x) |  |  |" in text
    assert "peak" not in text


def test_the_pruned_networks_are_written_into_the_page(tmp_path):
    case = {"model": "unet++-resnet34", "mode": "fast", "size": [512, 512], "impl": "fused", "batch": 1, "dtype": "float32"}
    rows = [
        row(level=1, median_ms=20.0, tflops=1.5, ratio_to={}, **case),
        row(level=4, median_ms=80.0, tflops=2.0, ratio_to={}, **case),
    ]
    page = tmp_path / "encoders.md"
    page.write_text(encoder_table.PAGE.read_text())
    encoder_table.write(page, rows)
    text = page.read_text()
    assert "| `prune(1)` | 30.0 | 0.19 | 20 | 0.25 |  |\n| `prune(4)` | 160.0 | 1.00 | 80 | 1.00 |  |" in text
    assert "†" not in text.partition(encoder_table.BEGIN)[2].partition(encoder_table.END)[0]
    older = encoder_table.pruned_table([{**rows[0], "source_hash": "0" * 16}, rows[1]])
    assert "| 20 † |" in older and older.endswith("medians. † is of older sources.")
    before = encoder_table.PAGE.read_text()
    for marker in (encoder_table.BEGIN, encoder_table.END):
        assert text.count(marker) == before.count(marker) == 1
    assert text.partition(encoder_table.BEGIN)[0] == before.partition(encoder_table.BEGIN)[0]
    assert text.partition(encoder_table.END)[2] == before.partition(encoder_table.END)[2]
    page.write_text("nothing")
    with pytest.raises(InputError, match="lacks the lines"):
        encoder_table.write(page, rows)


def test_operations_are_counted():
    conv = torch.nn.Conv2d(3, 1, 3, padding=1)
    assert encoder_table.Whole(conv).gflop((8, 8)) == 2 * 3 * 9 * 64 / 1e9


def test_what_to_install_where_smp_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(InputError, match="pip install segmentation_models_pytorch"):
        encoder_table.smp_module("resnet34")
