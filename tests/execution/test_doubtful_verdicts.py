"""What was measured while other programs used the cores: it holds for one process, and later ones measure again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.helpers import make_input
from support.measured import forget, own_store, small

from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import tuning, verdicts

CPU = torch.device("cpu")
KEY = "a pass 1x64x64"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    yield from own_store(tmp_path, monkeypatch)


@pytest.fixture
def machine(monkeypatch) -> dict[str, float]:
    """Says how long threads wait, and lets every call measure; nothing is timed."""
    state = {"waited": 0.0, "ratio": 2.0, "measured": 0, "timed": 0}

    def milliseconds(run, device, rounds=0):
        state["timed"] += 1
        return state["ratio"] if state["timed"] % 2 else 1.0

    def judge(*arguments, **options):
        state["measured"] += 1
        return one(*arguments, **options)

    one = tuning._judge
    monkeypatch.setattr(tuning, "_judge", judge)
    monkeypatch.setattr(tuning, "_is_right", lambda *arguments: True)
    monkeypatch.setattr(tuning, "milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "share_waited", lambda since: state["waited"])
    monkeypatch.setattr(tuning, "may_measure", lambda x: True)
    monkeypatch.setattr(dispatch, "_kernels", lambda call: ["cpu"])
    monkeypatch.setattr(dispatch, "can_run", lambda call, backend: (True, ""))
    return state


def chosen(machine: dict, waited: float, ratio: float) -> tuple[str, str]:
    """By a new process, while threads wait so long and the kernels are so many times as fast."""
    forget()
    machine.update(waited=waited, ratio=ratio)
    model, x = small()
    with torch.no_grad():
        choices = {dispatch.choose(Call(model.eval(), x)) for _ in range(3)}
    assert len(choices) == 1  # what a process has chosen it keeps
    return choices.pop()


def test_a_quiet_measurement_is_final(machine):
    assert chosen(machine, 0.01, 2.0)[0] == "cpu" and machine["measured"] == 1
    assert chosen(machine, 0.01, 0.5)[0] == "cpu" and machine["measured"] == 1


def test_a_busy_one_is_measured_again_by_the_next_process(machine, cache, monkeypatch):
    name, reason = chosen(machine, 0.4, 0.5)
    assert name == "reference" and reason.endswith("while other programs used the cores")
    monkeypatch.setattr(tuning, "_is_right", None)  # times were in doubt, not results
    assert chosen(machine, 0.0, 2.0) == ("cpu", "measured: the kernels take 0.50 of the reference's time")
    assert machine["measured"] == 2
    assert chosen(machine, 0.0, 0.5)[0] == "cpu" and machine["measured"] == 2
    (path,) = cache.glob("*.json")
    (kept,) = json.loads(path.read_text())["verdicts"].values()
    assert (kept["waited"], kept["ratio"], kept["tries"]) == (0.0, 2.0, 2)


def test_of_three_busy_ones_that_which_waited_least_is_final(machine):
    assert chosen(machine, 0.4, 2.0)[0] == "cpu"
    assert chosen(machine, 0.2, 0.5)[0] == "reference"
    assert chosen(machine, 0.3, 2.0)[0] == "reference"
    assert machine["measured"] == verdicts.TRIES == 3
    assert chosen(machine, 0.0, 2.0)[0] == "reference" and machine["measured"] == 3


def test_a_process_that_may_not_measure_takes_what_is_there(machine, monkeypatch):
    assert chosen(machine, 0.4, 2.0)[0] == "cpu"
    monkeypatch.setattr(tuning, "may_measure", lambda x: False)
    assert chosen(machine, 0.0, 0.5)[0] == "cpu" and machine["measured"] == 1


def test_a_failure_does_not_end_a_doubtful_verdict(machine, monkeypatch):
    assert chosen(machine, 0.4, 2.0)[0] == "cpu"
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "milliseconds", lambda *arguments: 1 / 0)
        assert "ZeroDivisionError" in chosen(machine, 0.0, 2.0)[1]
    assert chosen(machine, 0.0, 0.5)[0] == "reference" and machine["measured"] == 3


def test_a_process_does_not_write_back_what_it_only_read(cache):
    verdicts.keep(CPU, KEY, {"ratio": 1.0, "waited": 0.5})
    verdicts.save(CPU)
    forget()
    assert verdicts.recall(CPU, KEY) == ({"ratio": 1.0, "waited": 0.5}, True)
    path = verdicts.cache_file(CPU)
    better = {"ratio": 3.0, "waited": 0.0, "tries": 2}
    path.write_text(json.dumps({"configurations": {}, "verdicts": {KEY: better}}))  # by another process, meanwhile
    verdicts.keep(CPU, "another pass 1x64x64", {"ratio": 1.0})
    verdicts.save(CPU)
    assert json.loads(path.read_text())["verdicts"][KEY] == better


def test_a_later_process_chooses_as_the_one_before_if_it_is_told(machine, tmp_path: Path, monkeypatch):
    """As a training that is resumed; elsewhere, it measures for itself."""
    name = chosen(machine, 0.4, 0.5)[0]
    model, x = small()
    told = json.loads(json.dumps(dispatch.measured(model)))
    monkeypatch.setenv("UNETPP_FAST_CACHE", str(tmp_path / "another"))
    forget()
    machine.update(waited=0.0, ratio=2.0)
    dispatch.adopt(model, told)
    with torch.no_grad():
        assert dispatch.choose(Call(model.eval(), x))[0] == name == "reference" and machine["measured"] == 1
        assert dispatch.choose(Call(model, make_input(2, 1, 16, 16)))[0] == "cpu" and machine["measured"] == 2
    forget()
    dispatch.adopt(model, {f"{place} elsewhere": known for place, known in told.items()})
    with torch.no_grad():
        assert dispatch.choose(Call(model.eval(), x))[0] == "cpu"
