"""Whole networks by the CPU kernels, in float32, against the reference in float64: outputs and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cpu_kernels
from support.fused_cases import run_fused
from support.grids import pairs_of
from support.helpers import (
    FLOAT32,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from support.margin import MARGIN, Margin
from torch import Tensor

import unetpp_fast as uf
from unetpp_fast.execution import acceptance, reference

pytestmark = cpu_kernels.needs_library()
BOUND = 10 * FLOAT32  # gradients through normalised layers that add in another order
LEAKY = ("leaky_relu", {"negative_slope": 0.1})
UPSAMPLES = ["deconv", "nearest", "linear", ("linear", {"align_corners": True, "project": True})]
WIDTHS = {1: (3, 5), 2: (5, 7, 6), 3: (2, 5, 3, 4), 4: (2, 3, 5, 4, 3)}


@pytest.fixture(autouse=True, params=cpu_kernels.KERNELS)
def kernel(request, monkeypatch) -> str:
    """The kernel that computes convolutions, whatever their size."""
    cpu_kernels.select(request.param, monkeypatch.setattr)
    return request.param


def network(kind: str = "unet++", axes: int = 2, depth: int = 2, **options) -> uf.Network:
    maker = uf.UNetPlusPlus if kind == "unet++" else uf.UNet
    options |= {"deep_supervision": True} if kind == "unet++" else {}
    return build(maker, 2, 3, spatial_dims=axes, features=WIDTHS[depth], **options)


@torch.no_grad()
def image(
    model: uf.Network, batch: int = 2, layout: str = "contiguous", lowest: tuple[int, int, int] = (2, 3, 2), more: int = 0
) -> Tensor:
    """The first image whose gradients do not depend on rounding; `lowest`: pixels of the lowest level, beside `more` of the
    image.

    Statistics of three pixels would magnify rounding a hundred times: networks with a norm have more.
    """
    topology = model.topology
    size = [side * 2**topology.depth + more for side in lowest[: topology.spatial_dims]]
    for seed in range(100):
        x = make_input(batch, 2, *size, seed=seed, layout=layout)
        with Margin() as margin:
            reference.forward(copy.deepcopy(model).double(), x.double())
        if margin.least > MARGIN:
            return x
    raise AssertionError("every image has values too near to a choice")


def assert_same(model: uf.Network, x: Tensor, heads: slice = slice(None), inference: bool = True) -> None:
    """Outputs, gradients of input and parameters (absent ones too) and running statistics after a forward and a backward
    pass from some of the heads; then the outputs of a pass without gradients, in eval mode too."""
    exact = copy.deepcopy(model).double()
    results = []
    for net, run, values in ((exact, reference.forward, x.double()), (model, run_fused("cpu"), x)):
        mine = values.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = run(net, mine)
        weighted_sum(outputs[heads]).backward()
        results.append((outputs, mine.grad, gradients(net), dict(net.named_buffers())))
    (outputs, gx, of_parameters, buffers), (actual, actual_gx, actual_of_parameters, actual_buffers) = results
    assert_close_relative(actual, outputs, BOUND)
    assert_close_relative(actual_gx, gx, BOUND)
    assert_gradients_close(actual_of_parameters, of_parameters, BOUND)
    for name, buffer in buffers.items():
        assert_close_relative(actual_buffers[name].double(), buffer.double(), BOUND)
    for train in (model.training, False) if inference else ():
        with torch.no_grad():
            outputs = reference.forward(exact.train(train), x.double())
            assert_close_relative(run_fused("cpu")(model.train(train), x), outputs, BOUND)


@pytest.mark.parametrize(
    ("axes", "norm", "upsample", "train"),
    pairs_of([(2, 3), (None, "batch", "instance"), UPSAMPLES, (True, False)]),
    ids=str,
)
def test_every_norm_and_upsampling(axes, norm, upsample, train):
    model = network(axes=axes, norm=norm, upsample=upsample, act=LEAKY).train(train)
    assert_same(model, image(model))


@pytest.mark.parametrize(("axes", "upsample", "norm"), [
    (2, "deconv", "instance"), (2, "pixelshuffle", "batch"), (3, ("linear", {"align_corners": True, "project": True}), None),
])  # fmt: skip
def test_odd_sizes(axes, upsample, norm):
    topology = uf.Topology.nested(2, WIDTHS[2], spatial_dims=axes, all_heads=True)
    options = {"norm": norm, "act": LEAKY, "upsample": upsample, "odd_sizes": True, "deep_supervision": True}
    model = build(uf.Network, topology, 3, **options)
    assert_same(model, image(model, more=3))


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("axes", [2, 3])
def test_strided_convolutions_and_no_biases(axes, norm):
    options = {"downsample": "stride", "upsample": ("deconv", {"bias": False}), "head_bias": False, "bias": norm is None}
    topology = uf.Topology.nested(2, WIDTHS[2], spatial_dims=axes, all_heads=True)
    model = build(uf.Network, topology, 3, norm=norm, act=LEAKY, deep_supervision=True, **options)
    assert_same(model, image(model))


@pytest.mark.parametrize("kind", ["unet++", "unet"])
@pytest.mark.parametrize(("axes", "depth"), [(2, 1), (2, 3), (2, 4), (3, 1), (3, 3)])
def test_every_depth(kind, axes, depth):
    model = network(kind, axes, depth)
    assert_same(model, image(model, lowest=(2, 3, 2) if axes == 2 else (1, 2, 2)))


@pytest.mark.parametrize("lowest", [(1, 1, 1), (1, 3, 2), (3, 1, 1)])
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("upsample", UPSAMPLES[:3])
def test_lowest_levels_of_one_pixel(axes, upsample, lowest):
    model = network(axes=axes, norm=None, upsample=upsample)
    assert_same(model, image(model, lowest=lowest))


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_every_batch(batch, norm):
    model = network(norm=norm)
    assert_same(model, image(model, batch))


@pytest.mark.parametrize("layout", ["offset", "strided", "transposed", "channels_last", "expanded"])
def test_every_layout_of_the_input(layout):
    model = network()
    assert_same(model, image(model, layout=layout))


@pytest.mark.parametrize("heads", [slice(0, 1), slice(1, 2), slice(2, 3)])
def test_gradients_from_some_heads_reach_what_they_reach(heads):
    model = network(depth=3)
    assert_same(model, image(model), heads)


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
@pytest.mark.parametrize("level", [1, 2])
def test_pruned_networks(level, norm):
    model = network(depth=3, norm=norm)
    assert_same(model.prune(level), image(model))


def test_larger_maps():
    """Several blocks of pixels and of outputs. With a slope of 1: of so many values, some are so near zero that their sign,
    and with it a gradient, is a matter of rounding."""
    model = build(uf.UNetPlusPlus, 3, 2, features=(8, 40, 70), act=("leaky_relu", {"negative_slope": 1.0}))
    assert_same(model, make_input(1, 3, 76, 84))


@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_autocast_keeps_the_two_times_rule(norm):
    model = network(norm=norm)
    x = image(model)
    exact = copy.deepcopy(model).double()
    vectors = []
    for net, run, half in (
        (exact, reference.forward, False),
        (copy.deepcopy(model), reference.forward, True),
        (model, run_fused("cpu"), True),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            outputs = run(net, x if half else x.double())
        weighted_sum([output.float() if half else output for output in outputs]).backward()
        vectors.append([acceptance.as_vector(outputs), acceptance.as_vector(list(gradients(net).values()))])
    assert acceptance.disagreement(*vectors, torch.bfloat16) == ""


def test_three_training_steps_give_the_losses_and_weights_of_the_reference():
    results = []
    for run, dtype in ((reference.forward, torch.float64), (run_fused("cpu"), torch.float32)):
        model = network(norm="batch").to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        losses = []
        for step in range(3):
            x = make_input(2, 2, 8, 12, seed=step).to(dtype)
            loss = uf.BCEDiceLoss()(run(model, x), (x[:, :1] > 0).to(dtype).expand(-1, 3, -1, -1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append((torch.stack(losses), [*model.parameters(), *model.buffers()]))
    (losses, weights), (actual, actual_weights) = results
    assert_close_relative(actual, losses, FLOAT32)
    for a, e in zip(actual_weights, weights, strict=True):
        assert_close_relative(a.detach().double(), e.detach().double(), BOUND, floor=0.1)


@pytest.mark.parametrize("widths", [(5, 7, 6), (16, 32, 64)], ids=str)
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
def test_bits_are_those_of_any_run_and_number_of_threads(upsample, widths, threads):
    torch.manual_seed(0)
    model, x = uf.UNetPlusPlus(2, 3, features=widths, upsample=upsample), make_input(2, 2, 36, 44)
    runs = []
    for count in (1, 2, 3, 1):
        threads(count)
        net = copy.deepcopy(model)
        outputs = run_fused("cpu")(net, x)
        weighted_sum(outputs).backward()
        runs.append([*outputs, *gradients(net).values()])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("change", ["in place", "through data", "loaded"])
def test_changed_weights_are_used(change):
    """However they changed; packed weights are kept only for the values that they were packed from."""
    model = network().eval()
    x = image(model)
    other = network(seed=1).eval()
    with torch.no_grad():
        run_fused("cpu")(model, x)
        for mine, new in zip(model.parameters(), other.parameters(), strict=True):
            if change == "in place":
                mine.copy_(new)
            elif change == "through data":
                mine.data.copy_(new)
        if change == "loaded":
            model.load_state_dict(other.state_dict())
        for mine, new in zip(model.buffers(), other.buffers(), strict=True):
            mine.copy_(new)
        assert_close_relative(run_fused("cpu")(model, x), reference.forward(other, x), FLOAT32)


def test_inference_mode():
    model = network().eval()
    x = image(model)
    with torch.inference_mode():
        for _ in range(2):
            assert_close_relative(run_fused("cpu")(model, x), reference.forward(model, x), FLOAT32)
