"""The file of measurements: what is kept in it by whom, and what a broken one counts as."""

from __future__ import annotations

import json

import pytest
import torch
from support.measured import forget, own_store, small

from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import tuning, verdicts
from unetpp_fast.execution.fused.ops import HAS_TRITON, INTERPRETED
from unetpp_fast.kernels import tuning as kernel_tuning

pytestmark = pytest.mark.skipif(not (HAS_TRITON and INTERPRETED), reason="needs Triton and its interpreter")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    yield from own_store(tmp_path, monkeypatch)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"configurations": {}}'])
def test_a_file_that_cannot_be_read_counts_as_none(cache, content):
    model, x = small()
    path = verdicts.cache_file(x.device)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert dispatch.choose(Call(model, x))[0] == "reference"


def test_processes_keep_what_each_other_has_measured(monkeypatch):
    """The second one to write adds to the file; nobody else is between its reading and writing."""
    fcntl = pytest.importorskip("fcntl")
    device, ratio = torch.device("cpu"), {"right": True, "ratio": 2.0}
    names = [name + kernel_tuning.place(device) for name in ("first", "second")]
    for name in names:
        forget()
        verdicts._loaded.add(verdicts.setting(device))  # began before the other one wrote
        kernel_tuning.table[name] = "1.0"
        verdicts.keep(device, name, ratio)
        verdicts.save(device)
    content = json.loads(verdicts.cache_file(device).read_text())
    assert content == {"configurations": dict.fromkeys(names, "1.0"), "verdicts": dict.fromkeys(names, ratio)}

    def write(path, _):
        with open(path.with_suffix(".lock")) as stream, pytest.raises(BlockingIOError):
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        writes.append(path)

    writes = []
    monkeypatch.setattr(verdicts, "write_atomic", write)
    verdicts.save(device)
    assert writes == [verdicts.cache_file(device)]


def test_a_tuning_that_is_stopped_keeps_what_it_has_measured(monkeypatch):
    model, x = small()
    monkeypatch.setattr(tuning, "milliseconds", lambda run, device: run())
    names = [name + kernel_tuning.place(x.device) for name in ("first", "second")]

    def compute(call, backend):
        kernel_tuning.choose(names[0], (1,), lambda: [3.0, 2.0], lambda time: time)
        kernel_tuning.choose(names[1], (1,), lambda: [3.0, KeyboardInterrupt], stop)

    def stop(candidate):
        if candidate is KeyboardInterrupt:
            raise candidate
        return candidate

    with pytest.raises(KeyboardInterrupt):
        tuning._time_candidates(Call(model.eval(), x), "triton", "inference", False, compute)
    assert json.loads(verdicts.cache_file(x.device).read_text())["configurations"] == {names[0]: "2.0"}
