"""Rows of benchmarks: what a row must contain, how a file is merged in one step, and which rows are current."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from support.rows import FACTS, row

from unetpp_fast import info
from unetpp_fast.benchmarking import records
from unetpp_fast.common.devices import device_name
from unetpp_fast.common.errors import InputError
from unetpp_fast.execution import source_hash

GOOD = [
    row(),
    row(bench="training", peak_mb=12.5, peak_ratio_to={"eager": 0.4}),
    row(bench="kernel", model="conv", level=0, mode=None, gb_s=3.0, share_of_ceiling=0.5, flop=10, bytes=4),
    row(bench="memory", memory_of="training", median_ms=None, p20_ms=None, p80_ms=None, peak_mb=3.0, ratio_to={}),
]
BAD = [
    ({"bench": "speed"}, "bench cannot be 'speed'"),
    ({"level": 0}, "level cannot be 0"),
    ({"level": True}, "level cannot be True"),
    ({"mode": None}, "mode cannot be None"),
    ({"size": "512x512"}, "size cannot be"),
    ({"size": [512]}, "size cannot be"),
    ({"batch": 0}, "batch cannot be 0"),
    ({"dtype": "float64"}, "dtype cannot be"),
    ({"impl": "mine"}, "impl cannot be"),
    ({"median_ms": None}, "needs median_ms"),
    ({"median_ms": math.nan}, "median_ms cannot be nan"),
    ({"median_ms": 9.0}, "not in order"),
    ({"tflops": -1.0}, "tflops cannot be"),
    ({"ratio_to": {"fused": 1.0}}, "ratio_to cannot be"),
    ({"ratio_to": {"eager": 0.0}}, "ratio_to cannot be"),
    ({"peak_ratio_to": None}, "peak_ratio_to cannot be"),
    ({"device": ""}, "device cannot be ''"),
    ({"source_hash": "main"}, "source_hash cannot be"),
    ({"date": "yesterday"}, "date cannot be"),
    ({"memory_of": "training"}, "memory_of cannot be"),
    ({"bench": "memory", "memory_of": "training"}, "needs peak_mb"),
    ({"colour": "red"}, "colour is not known"),
]


@pytest.mark.parametrize("good", GOOD, ids=lambda good: good["bench"])
def test_a_valid_row_has_no_fault(good):
    assert records.faults(good) == [] and set(records.FIELDS) <= set(good)


@pytest.mark.parametrize(("changes", "says"), BAD, ids=str)
def test_a_bad_row_says_what_is_wrong(changes, says):
    assert says in "; ".join(records.faults(row(**changes)))


@pytest.mark.parametrize("name", records.FIELDS)
def test_every_field_must_be_there(name):
    assert records.faults({key: value for key, value in row().items() if key != name}) == [f"{name} is missing"]


def test_every_record_of_this_tree_is_valid():
    for path in sorted(records.RESULTS.glob("*.json")):
        rows = records.read(path)
        assert rows and len({records.identity(kept) for kept in rows}) == len(rows), path


def test_a_new_row_replaces_the_one_of_its_identity(tmp_path):
    path = tmp_path / "machine.json"
    records.merge(path, GOOD)
    records.merge(path, [row(median_ms=2.5), row(batch=2)])
    rows = records.read(path)
    assert len(rows) == 5
    assert [kept["median_ms"] for kept in rows if records.identity(kept) == records.identity(row())] == [2.5]
    before = path.read_text()
    records.merge(path, reversed(rows))
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    assert records.read_all(tmp_path) == {"machine": rows}


def test_a_bad_row_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "machine.json"
    records.merge(path, GOOD)
    before = path.read_text()
    with pytest.raises(ValueError, match="batch cannot be 0"):
        records.merge(path, [row(batch=3), row(batch=0)])
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "says"), [("{", "cannot be read as records"), ("{}", "is not a list"), ('[{"a": 1}]', "row 0")]
)
def test_a_damaged_file_is_named(tmp_path, text, says):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(InputError, match=says):
        records.read(path)


def test_a_change_of_kernels_or_engine_shows_and_one_of_a_command_does_not(tmp_path):
    names = ("kernels/conv.py", "csrc/inner/conv.cu", "unetpp_fast/execution/fused/forward.py", "unetpp_fast/cli/parser.py")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    hashes = [source_hash.source_hash.__wrapped__(tmp_path / "unetpp_fast")]
    for name in names:
        (tmp_path / name).write_text("after")
        hashes.append(source_hash.source_hash.__wrapped__(tmp_path / "unetpp_fast"))
    assert len(set(hashes)) == 4 and hashes[3] == hashes[4]


def test_a_row_of_other_sources_is_stale():
    assert records.is_current(row(source_hash=source_hash.source_hash()))
    assert not records.is_current(row(source_hash="0" * 16))


def test_the_sources_hold_the_kernels_and_the_engine():
    names = set(source_hash.pass_files())
    engine = ("forward", "backward", "operators")
    assert {f"unetpp_fast/execution/fused/{name}.py" for name in engine} <= names
    assert {"kernels/conv.py", "kernels/naive.py", "csrc/conv.h", "unetpp_fast/execution/plan/steps.py"} <= names
    assert not any("/cli/" in name or "/benchmarking/" in name or name.endswith(".pyc") for name in names)


def test_a_machine_has_a_name_for_a_file_and_one_for_people(monkeypatch):
    device = torch.device("cpu")
    assert f"{torch.get_num_threads()} thread" in device_name(device)
    assert set(records.machine(device)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    monkeypatch.setenv("UNETPP_FAST_COMMIT", "abc")
    assert records.facts(device)["commit"] == "abc"


def test_info_says_which_records_are_current(tmp_path, monkeypatch):
    on_gpu = {"cuda": "13.0", "device": "A GPU", "source_hash": source_hash.source_hash()}
    records.merge(tmp_path / "gpu.json", [row(**on_gpu), row(**{**on_gpu, "batch": 2, "source_hash": "0" * 16})])
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records.read_all, "__defaults__", (tmp_path,))
    monkeypatch.setattr(records.summary, "__defaults__", (tmp_path,))
    text = "\n".join(info.lines())
    assert "A GPU: 1 current, 1 stale" in text and f"A GPU, commit {FACTS['commit']}" in text
    assert source_hash.source_hash() in text
    (tmp_path / "gpu.json").write_text("{")
    assert "cannot be read as records" in "\n".join(info.lines())


def test_rows_are_plain_json():
    assert all(json.loads(json.dumps(good)) == good for good in GOOD) and "json" in sys.modules


@pytest.mark.parametrize(
    ("value", "shown"), [(2309.6, "2310"), (38.148, "38.1"), (0.12345, "0.123"), (1000.4, "1000"), (7.0, "7")]
)
def test_times_are_shown_in_three_digits(value, shown):
    assert records.digits(value) == shown
