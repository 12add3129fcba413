"""Whole networks by the Triton kernels, in the interpreter, against the reference: forward, backward, training."""

from __future__ import annotations

import copy

import pytest
import torch
from support.fused_cases import assert_same_inference, assert_same_passes
from support.helpers import FLOAT32, assert_close_relative, build, make_input

import unetpp_fast as uf
from unetpp_fast.architecture.options import reduces_channels
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import ops

pytestmark = pytest.mark.skipif(not (ops.HAS_TRITON and ops.INTERPRETED), reason="needs Triton and its interpreter")
BOUND = 1e-4  # float32 gradients through normalised layers, summed in another order
CASES = [
    (2, 1, {"norm": "batch", "upsample": "deconv"}),
    (2, 2, {"norm": "instance", "upsample": "nearest", "act": ("leaky_relu", {"negative_slope": 0.1})}),
    (2, 1, {"norm": None, "upsample": "linear"}),
    (3, 1, {"norm": None, "upsample": "deconv"}),
    (3, 1, {"norm": "batch", "upsample": "nearest"}),
    (2, 1, {"norm": "instance", "downsample": "stride", "upsample": ("deconv", {"bias": False}), "head_bias": False}),
    (3, 1, {"norm": "batch", "downsample": "stride", "upsample": ("deconv", {"bias": False}), "head_bias": False}),
]


def network(axes: int, depth: int, **options) -> uf.Network:
    up = None if reduces_channels(options.get("upsample", "deconv")) else lambda low, level: low
    topology = uf.Topology.nested(1, (3, 5, 4)[: depth + 1], spatial_dims=axes, all_heads=True, up_width=up)
    return build(uf.Network, topology, 2, deep_supervision=True, backend="triton", **options)


def test_a_projection_to_more_channels_than_a_head_has_classes():
    model = build(uf.UNet, 1, 1, features=(65, 2), norm=None, upsample=("linear", {"project": True}), backend="triton")
    assert_same_passes(model, make_input(1, 1, 2, 4), "triton", bound=BOUND)


def test_widths_that_fill_their_blocks():
    """The kernels load such channels without a mask."""
    model = build(uf.UNetPlusPlus, 3, 2, features=(16, 32), backend="triton")
    assert_same_passes(model, make_input(1, 3, 4, 4), "triton", bound=BOUND)


@pytest.mark.parametrize(("axes", "depth", "options"), CASES, ids=str)
def test_outputs_and_every_gradient(axes, depth, options):
    model = network(axes, depth, **options)
    x = make_input(2, 1, *(size * 2**depth for size in (1, 3, 2)[:axes]))
    assert dispatch.choose(Call(model, x))[0] == "triton"
    assert_same_passes(model, x, "triton", bound=BOUND)
    assert_same_inference(model.eval(), x, "triton", bound=FLOAT32)


@pytest.mark.parametrize("upsample", ["deconv", "pixelshuffle"])
def test_odd_sizes(upsample):
    model, x = network(2, 1, norm="batch", upsample=upsample, odd_sizes=True), make_input(1, 1, 5, 4)
    assert dispatch.choose(Call(model, x))[0] == "triton"
    assert_same_passes(model, x, "triton", bound=BOUND)


def test_weights_may_change_between_calls_in_any_way():
    """Also by ways of which no version counter tells; running statistics too."""
    model, x = network(2, 1, norm="batch").eval(), make_input(1, 1, 4, 6)
    assert_same_inference(model, x, "triton", bound=FLOAT32)
    model.nodes["x0_1"].conv1.weight.data.mul_(1.5)
    model.nodes["x0_1"].up.bias.data += 0.5
    model.nodes["x1_0"].norm2.running_var.data += 1
    model.nodes["x0_0"].norm1.bias.data.neg_()
    assert_same_inference(model, x, "triton", bound=FLOAT32)


def test_half_precision_keeps_the_two_times_rule():
    model = network(2, 1, norm="batch")
    x = make_input(2, 1, 4, 6)
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    usual = copy.deepcopy(model)
    usual.backend = "reference"
    expected = exact(x.double())
    with torch.autocast("cpu", torch.float16):
        for e, u, f in zip(expected, usual(x), model(x), strict=True):
            assert f.dtype == torch.float16
            rounding = torch.finfo(torch.float16).eps * e.abs().max()
            assert (f.double() - e).abs().max() <= 2 * (u.double() - e).abs().max() + rounding


def test_three_training_steps_give_the_losses_and_weights_of_the_reference():
    results = []
    for backend in ("reference", "triton"):
        model = network(2, 2, norm="batch")
        model.backend = backend
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(3):
            x = make_input(2, 1, 8, 8, seed=step)
            loss = uf.BCEDiceLoss()(model(x), (x > 0).float().expand(-1, 2, -1, -1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append((torch.stack(losses), [*model.parameters(), *model.buffers()]))
    (expected_losses, expected_weights), (losses, weights) = results
    assert_close_relative(losses, expected_losses, FLOAT32)
    for a, b in zip(weights, expected_weights, strict=True):
        assert_close_relative(a.detach().double(), b.detach().double(), BOUND, floor=0.1)


def test_predict_runs_on_the_kernels(capsys):
    model = network(2, 1, norm="batch")
    x = make_input(1, 1, 5, 7)
    usual = copy.deepcopy(model)
    usual.backend = "reference"
    assert_close_relative(model.predict(x, mode="fast", level=1), usual.predict(x, mode="fast", level=1), FLOAT32)
    text = uf.explain(model, make_input(1, 1, 4, 6))
    assert text.count("\ntriton ") == 3 and "reference" not in text and capsys.readouterr().out.strip() == text
