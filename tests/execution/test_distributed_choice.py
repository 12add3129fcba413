"""Processes that share batch statistics take the same backend (Gloo, CPU): whatever differs between them, none waits for
another forever.

The kernels are the plain PyTorch ones of `naive.py` here; what they were measured to be is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from support.helpers import FLOAT32, assert_gradients_close, build, gradients, make_input
from support.processes import run_processes

import unetpp_fast as uf
from unetpp_fast.execution import dispatch, reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators, ops, tuning
from unetpp_fast.kernels import naive
from unetpp_fast.training.processes import sync_batch_norm

pytestmark = pytest.mark.skipif(not (ops.HAS_TRITON and ops.INTERPRETED), reason="needs Triton and its interpreter")
SECONDS = 6.0  # after which a collective operation of the training fails
FASTER = {"right": True, "ratio": 2.0, "backend": "triton", "fused_ms": 1.0, "reference_ms": 2.0}
SLOWER = {**FASTER, "ratio": 0.5}


def network(backend: str = "auto", **options) -> uf.Network:
    group = dist.new_group(timeout=timedelta(seconds=SECONDS))
    return sync_batch_norm(build(uf.UNetPlusPlus, 2, 2, features=(4, 6), backend=backend, **options), group)


def image(rank: int, size: int = 8) -> torch.Tensor:
    return make_input(2, 2, size, 4, seed=rank)


def step(model: uf.Network, x: torch.Tensor) -> str:
    """A training step; the backend that computed it."""
    used = []

    def compute(call: Call, backend: str) -> list[torch.Tensor]:
        used.append(backend)
        return reference.forward(call.network, call.x) if backend == "reference" else operators.forward(call, backend)

    with patch.object(dispatch, "compute", compute):
        sum(head.square().sum() for head in dispatch.forward(model, x)).backward()
    return used[0] if used else "reference"


def measured(*verdicts: dict):
    """Each process finds its verdict, by its rank, on disk."""
    return patch.object(tuning, "verdict", lambda call: verdicts[dist.get_rank()])


def a_hook_on_one_process(rank: int, backend: str) -> dict:
    model = network(backend)
    if rank:
        model.nodes["x0_0"].conv1.register_forward_hook(lambda *_: None)
    with measured(FASTER, FASTER):
        used = [step(model, image(rank)) for _ in range(2)]
    return {"used": used, "reason": dispatch.choose(Call(model, image(rank)))[1], "gradients": gradients(model)}


def auto_hook(rank: int) -> dict:
    return a_hook_on_one_process(rank, "auto")


def asked_hook(rank: int) -> dict:
    return a_hook_on_one_process(rank, "triton")


def another_backend_asked_for(rank: int) -> dict:
    model = network("reference" if rank else "triton")
    used = [step(model, image(rank)) for _ in range(2)]
    return {"used": used, "reason": dispatch.choose(Call(model, image(rank)))[1]}


def a_backend_of_the_first_alone(rank: int) -> dict:
    """Only the first process has the compiled CUDA kernels."""
    model = network()
    kernels = ["triton", "cuda"] if rank == 0 else ["triton"]
    with (
        patch.object(dispatch, "_kernels", lambda call: kernels),
        patch.object(dispatch.libraries, "load", lambda kind: (True, "")),
        measured({**FASTER, "backend": "cuda"}, FASTER),
    ):
        return {"used": [step(model, image(rank))], "reason": dispatch.choose(Call(model, image(rank)))[1]}


def minutes_of_measuring(rank: int) -> dict:
    """Longer than any collective operation of the training may take."""
    model = network()

    def judge(call: Call, kernels: list[str], compute: Callable) -> dict:
        time.sleep(SECONDS + 2)
        return FASTER

    with patch.object(tuning, "may_measure", lambda x: True), patch.object(tuning, "judge", judge), measured(None, None):
        return {"used": [step(model, image(rank)) for _ in range(2)]}


def other_sizes_and_verdicts(rank: int) -> dict:
    """Sizes and measurements that one process alone has, or has earlier than another."""
    model = network()
    with measured(FASTER, SLOWER):
        used = [step(model, image(rank, size)) for size in ((8, 8, 24, 8) if rank else (8, 16, 16, 32))]
        model.eval()
        used.append(dispatch.choose(Call(model, image(rank)))[0])  # nothing is shared
    return {"used": used}


def one_norm_in_training(rank: int) -> dict:
    model = network().eval()
    model.nodes["x0_0"].norm1.train()
    with measured(FASTER, SLOWER):
        return {"used": [step(model, image(rank))]}


def explaining_alone(rank: int) -> dict:
    """Nobody else takes part: the first process is elsewhere until the others have finished."""
    model, meeting, texts = network(), dist.new_group(timeout=timedelta(seconds=SECONDS)), []
    with measured(FASTER, FASTER):
        for _ in range(2):
            if rank:
                texts.append(uf.explain(model, image(rank)).splitlines())
            dist.barrier(meeting)
            texts.append([step(model, image(rank))])
        model.nodes["x0_0"].conv1.register_forward_hook(lambda *_: None)
        texts.append(uf.explain(model, image(rank)).splitlines())
    return {"texts": texts}


def unable_later(rank: int) -> dict:
    """The process that can no longer follow says so."""
    model, error = network("triton"), ""
    used = [step(model, image(rank))]
    if rank:
        model.nodes["x0_0"].conv1.register_forward_hook(lambda *_: None)
        try:
            step(model, image(rank))
        except RuntimeError as found:
            error = str(found)
    return {"used": used, "error": error}


def other_kinds_of_passes(rank: int) -> dict:
    """Each kind is decided for itself, and so is another backend that all ask for."""
    model, used = network(), []
    inference = {**SLOWER, "backend": "triton"}
    with patch.object(tuning, "verdict", lambda call: FASTER if call.needs_gradients else inference):
        with torch.no_grad():
            used.append(dispatch.choose(Call(model, image(rank)))[0])
        used.append(step(model, image(rank)))
        model.backend = "reference"
        used.append(step(model, image(rank)))
    return {"used": used}


SCENARIOS = (
    auto_hook, asked_hook, another_backend_asked_for, a_backend_of_the_first_alone, minutes_of_measuring,
    other_sizes_and_verdicts, one_norm_in_training, explaining_alone, unable_later, other_kinds_of_passes,
)  # fmt: skip


def everything(rank: int) -> dict:
    """What each scenario returned, or its error: the processes start only once."""
    found = {}
    with patch.object(operators, "load_ops", lambda name: naive):
        for scenario in SCENARIOS:
            try:
                found[scenario.__name__] = scenario(rank)
            except Exception as error:
                found[scenario.__name__] = {"failed": f"{type(error).__name__}: {error}"}
            dist.barrier()  # a scenario that failed in one process does not spoil the next
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return run_processes(everything, tmp_path_factory.mktemp("two"))


@pytest.fixture
def found(two, request) -> list[dict]:
    """What both processes returned from the scenario of a test."""
    results = [of_process[request.param.__name__] for of_process in two]
    assert not [result["failed"] for result in results if "failed" in result]
    return results


def of(scenario: Callable) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("found", [scenario], indirect=True, ids=[""])


@pytest.mark.parametrize("found", [auto_hook, asked_hook], indirect=True, ids=["auto", "triton"])
def test_all_take_the_reference_if_one_cannot_run_the_kernels(found):
    alone = build(uf.UNetPlusPlus, 2, 2, features=(4, 6), backend="reference")
    for _ in range(2):
        alone(torch.cat([image(0), image(1)])).square().sum().backward()
    for result in found:
        assert result["used"] == ["reference", "reference"]
        assert result["reason"].startswith("process 1 takes the reference: a layer was replaced")
    first, second = (result["gradients"] for result in found)
    together = {name: gradient + second[name] for name, gradient in first.items()}
    assert_gradients_close(together, gradients(alone), FLOAT32)


@of(another_backend_asked_for)
def test_all_take_the_reference_if_one_asks_for_it(found):
    for result in found:
        assert result == {"used": ["reference"] * 2, "reason": "process 1 takes the reference: asked for"}


@of(a_backend_of_the_first_alone)
def test_a_backend_that_one_process_lacks_is_not_taken(found):
    reason = "process 1 cannot run cuda, the choice of the first process"
    assert found == [{"used": ["reference"], "reason": reason}] * 2


@of(minutes_of_measuring)
def test_the_first_process_may_measure_longer_than_collectives_may_take(found):
    assert [result["used"] for result in found] == [["triton", "triton"]] * 2


@of(other_sizes_and_verdicts)
def test_sizes_and_verdicts_of_one_process_change_nothing(found):
    assert [result["used"] for result in found] == [["triton"] * 5, ["triton"] * 4 + ["reference"]]


@of(one_norm_in_training)
def test_norms_that_train_in_a_network_that_does_not_are_decided_on_too(found):
    assert [result["used"] for result in found] == [["triton"]] * 2


@of(explaining_alone)
def test_explain_asks_no_other_process(found):
    before, first, after, second, last = found[1]["texts"]
    assert len(before) == 1 and "undecided (the processes that share statistics decide together, at" in before[0]
    assert first == second == ["triton"]
    assert "triton (agreed on by all processes that share statistics; measured: " in after[0] and len(after) > 1
    assert "reference (a layer was replaced" in last[0]
    assert found[0]["texts"][:2] == [["triton"]] * 2


@of(unable_later)
def test_a_process_that_cannot_follow_later_says_so(found):
    assert [result["used"] for result in found] == [["triton"]] * 2
    assert "agreed on the backend 'triton'" in found[1]["error"] and "a layer was replaced" in found[1]["error"]


@of(other_kinds_of_passes)
def test_every_kind_of_pass_is_decided_for_itself(found):
    assert [result["used"] for result in found] == [["reference", "triton", "reference"]] * 2
