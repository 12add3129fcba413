"""Batch norm statistics over two processes (Gloo, CPU): they give the results of one process."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from support.helpers import FLOAT32, FLOAT64, assert_close_relative, assert_gradients_close, build, gradients, make_input
from support.processes import run_processes

import unetpp_fast as uf
from unetpp_fast.execution import built, reference
from unetpp_fast.execution.batch_statistics import SyncedBatchNorm
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators, ops
from unetpp_fast.training.processes import sync_batch_norm


def network(axes: int = 2, dtype: torch.dtype = torch.float64) -> uf.Network:
    options = {"spatial_dims": axes, "features": (4, 6, 9), "deep_supervision": True}
    return build(uf.UNetPlusPlus, 2, 2, **options).to(dtype)


def image(axes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return make_input(3, 2, *(8, 12, 4)[:axes], dtype=dtype)


def passes(model: uf.Network, x: torch.Tensor, start: int, run) -> dict:
    """Outputs, gradients and running statistics of a step on the images of a batch from `start` on."""
    x = x.clone().requires_grad_()
    outputs = run(model, x)
    weights = [make_input(3, *head.shape[1:], seed=7 + k, dtype=head.dtype) for k, head in enumerate(outputs)]
    images = slice(start, start + len(x))
    sum((head * weight[images]).sum() for head, weight in zip(outputs, weights, strict=True)).backward()
    return {
        "outputs": [head.detach() for head in outputs], "input": x.grad, "gradients": gradients(model),
        "buffers": dict(model.named_buffers()),
    }  # fmt: skip


def forward_by(name: str):
    if name == "reference":
        return reference.forward
    return lambda model, x: operators.forward(Call(model, x, x.dtype), name)


def share_of_a_step(rank: int, axes: int, name: str, first: int) -> dict:
    """A step on one process's images of a batch of three: the first `first` images, or the rest."""
    dtype = torch.float32 if name == "triton" else torch.float64
    model, x = sync_batch_norm(network(axes, dtype)), image(axes, dtype)
    share = x[:first] if rank == 0 else x[first:]
    results = passes(model, share, 0 if rank == 0 else first, forward_by(name))
    for gradient in results["gradients"].values():
        dist.all_reduce(gradient)
    return results


def names_and_modes() -> dict:
    model = network()
    synced = sync_batch_norm(copy.deepcopy(model))
    x = image(2)
    synced.load_state_dict(model.state_dict())
    equal = all(torch.equal(a, b) for a, b in zip(model.eval()(x), synced.eval()(x), strict=True))
    return {
        "equal": equal, "names": list(synced.state_dict()) == list(model.state_dict()),
        "engine": not built.changed(synced),
        "pruned": synced.prune(1).sync_group == synced.sync_group,
        "count": sum(isinstance(module, SyncedBatchNorm) for module in synced.modules()),
    }  # fmt: skip


CASES = [(axes, name, first) for axes in (2, 3) for name in ("reference", "naive") for first in (1, 3)]
CASES += [(2, "triton", 2)] * (ops.HAS_TRITON and ops.INTERPRETED)


def everything(rank: int) -> dict:
    """Everything that needs two processes: they start only once."""
    return {"steps": [share_of_a_step(rank, *case) for case in CASES], "modes": names_and_modes()}


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    return run_processes(everything, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_take_statistics_together(two, case):
    """Outputs, gradients and running statistics, in float64, with a different number of images in each process, or none."""
    axes, name, _ = case
    bound = 10 * FLOAT32 if name == "triton" else FLOAT64
    one = passes(network(axes), image(axes), 0, reference.forward)
    shares = [of_process["steps"][CASES.index(case)] for of_process in two]
    for index, expected in enumerate(one["outputs"]):
        assert_close_relative(torch.cat([share["outputs"][index] for share in shares]), expected, bound)
    assert_close_relative(torch.cat([share["input"] for share in shares]), one["input"], bound)
    for share in shares:
        assert_gradients_close(share["gradients"], one["gradients"], bound)
        for key, buffer in one["buffers"].items():
            assert_close_relative(share["buffers"][key].double(), buffer.double(), bound)


def test_a_synced_network_is_the_same_in_eval_mode(two):
    for modes in (of_process["modes"] for of_process in two):
        assert all(modes[key] for key in ("equal", "names", "engine", "pruned")) and modes["count"] == 12


def test_syncing_needs_processes():
    with pytest.raises(RuntimeError, match="torchrun"):
        sync_batch_norm(network())
