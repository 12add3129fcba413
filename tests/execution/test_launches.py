"""How much of the host a pass by the Triton kernels takes: launches, other operators, allocations."""

from __future__ import annotations

import pytest
import torch
from support.helpers import build, make_input
from support.launches import Operators, stubbed

import unetpp_fast as uf
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators, ops

pytestmark = pytest.mark.skipif(not ops.HAS_TRITON, reason="needs Triton")


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@pytest.mark.parametrize(("size", "batch"), [(96, 16), (224, 8)])
def test_a_training_step(size, batch, upsample):
    """At sizes where a step takes a GPU a few milliseconds, and with a gradient from every head."""
    model = build(uf.UNetPlusPlus, 1, 1, upsample=upsample, deep_supervision=True)
    x = make_input(batch, 1, size, size)
    for _ in range(2):  # in the first, tables are made
        model.zero_grad()
        with stubbed() as launches, Operators() as counted:
            outputs = operators.forward(Call(model, x, torch.bfloat16), "triton")
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    others, allocations = sum(counted.others.values()), sum(counted.allocations.values())
    print(f"{sum(launches.values())} launches, {others} other operators, {allocations} allocations")
    assert launches["_conv_kernel"] == 69 and launches["_conv_wgrad_kernel"] == 40  # all of the pass was counted
    assert sum(launches.values()) <= 230, launches
    assert others <= 150, counted.others
    assert allocations <= 60, counted.allocations


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
def test_inference(upsample, norm):
    """Without `optimize`: weights are composed in every call, as they may have changed in any way, by two kernels."""
    model = build(uf.UNetPlusPlus, 1, 1, upsample=upsample, norm=norm, deep_supervision=True).eval()
    with torch.no_grad():
        for _ in range(2):
            with stubbed() as launches, Operators() as counted:
                operators.forward(Call(model, make_input(1, 1, 96, 96), torch.bfloat16), "triton")
    assert launches["_conv_kernel"] == 30 and launches["_arrange_kernel"] == launches["_phases_kernel"] == 1
    assert sum(launches.values()) <= 70, launches
    assert sum(counted.others.values()) <= 20, counted.others
    assert sum(counted.allocations.values()) <= 25, counted.allocations
