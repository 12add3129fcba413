"""Inference by the CPU kernels against the reference: every kind of network, layout and size."""

from __future__ import annotations

import copy

import pytest
import torch
from support import cpu_kernels
from support.grids import pairs_of
from support.helpers import FLOAT32, LAYOUTS, assert_close_relative, build, make_input

import unetpp_fast as uf
from unetpp_fast.execution import acceptance, dispatch, reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.cpu import inference
from unetpp_fast.kernels import cpu_ops

LEAKY = ("leaky_relu", {"negative_slope": 0.1})
UPSAMPLES = [
    "deconv",
    "nearest",
    "linear",
    ("linear", {"align_corners": True, "project": True}),
    ("nearest", {"project": True}),
]
NORMS = [None, "batch", "instance"]
WIDTHS = {1: (3, 5), 2: (5, 7, 6), 3: (2, 5, 3, 4), 4: (2, 3, 5, 4, 3)}


pytestmark = pytest.mark.skipif(not dispatch.CPU_KERNELS[0], reason=f"the CPU kernels are off: {dispatch.CPU_KERNELS[1]}")


@pytest.fixture(autouse=True, params=cpu_kernels.KERNELS)
def convolutions(request, monkeypatch):
    """Every kernel of convolutions, whatever the size of a map."""
    cpu_kernels.select(request.param, monkeypatch.setattr)
    inference.buffers.clear()
    yield
    inference.buffers.clear()


def network(axes: int = 2, depth: int = 2, kind: str = "unet++", **options) -> uf.Network:
    options |= {"deep_supervision": True} if kind == "unet++" else {}
    maker = uf.UNetPlusPlus if kind == "unet++" else uf.UNet
    return build(maker, 2, 3, spatial_dims=axes, features=WIDTHS[depth], backend="cpu", **options).eval()


def image(axes: int = 2, depth: int = 2, batch: int = 2, layout: str = "contiguous", smallest=(3, 5, 2)) -> torch.Tensor:
    return make_input(batch, 2, *(size * 2**depth for size in smallest[:axes]), layout=layout)


@torch.no_grad()
def assert_same(model: uf.Network, x: torch.Tensor, bound: float = FLOAT32) -> None:
    """The model runs on the CPU kernels, twice over the same buffers, and gives what the reference gives."""
    assert dispatch.choose(Call(model, x))[0] == "cpu"
    expected = reference.forward(model, x)
    for _ in range(2):
        outputs = model(x)
        assert_close_relative(outputs if isinstance(outputs, list) else [outputs], expected, bound)


@torch.no_grad()
def assert_two_times_rule(model: uf.Network, x: torch.Tensor, dtype: torch.dtype) -> None:
    exact = reference.forward(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype):
        assert dispatch.choose(Call(model, x))[0] == "cpu"
        usual, found = reference.forward(model, x), model(x)
    assert all(output.dtype == dtype for output in found)
    vectors = [[acceptance.as_vector(outputs)] for outputs in (exact, usual, found)]
    assert acceptance.disagreement(*vectors, dtype) == ""


@pytest.mark.parametrize(("axes", "norm", "upsample", "act"), pairs_of([(2, 3), NORMS, UPSAMPLES, ("relu", LEAKY)]), ids=str)
def test_every_norm_upsampling_and_activation(axes, norm, upsample, act):
    model = network(axes, norm=norm, upsample=upsample, act=act)
    assert_same(model, image(axes))
    assert_two_times_rule(model, image(axes), torch.bfloat16)


@pytest.mark.parametrize("kind", ["unet++", "unet"])
@pytest.mark.parametrize(("axes", "depth"), [(2, 1), (2, 3), (2, 4), (3, 1), (3, 3)])
def test_every_depth_down_to_one_pixel(kind, axes, depth):
    assert_same(network(axes, depth, kind), image(axes, depth, smallest=(1, 1, 1)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("level", [1, 2, 3])
def test_pruned_networks(level, norm):
    assert_same(network(depth=3, norm=norm).prune(level), image(depth=3))


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("norm", NORMS)
def test_every_batch(batch, norm):
    assert_same(network(norm=norm), image(batch=batch))


@pytest.mark.parametrize("kind", ["unet++", "unet"])
@pytest.mark.parametrize("norm", [None, "batch"])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
def test_nodes_strip_by_strip(upsample, norm, kind, monkeypatch):
    """Strips of 16 rows at every level; the map of the first convolutions never exists as a whole."""
    monkeypatch.setattr(cpu_ops, "LEAST_PAIRED", 1)
    monkeypatch.setattr(cpu_ops, "PAIRED", 1)
    calls, pair = [], cpu_ops.conv_pair
    monkeypatch.setattr(cpu_ops, "conv_pair", lambda *args, **options: calls.append(args[1]) or pair(*args, **options))
    model, x = network(depth=2, norm=norm, upsample=upsample, kind=kind), make_input(2, 2, 44, 36)
    assert_same(model, x)
    assert len(calls) == 2 * len(model.topology.nodes) and all(mid.shape[2] <= 25 for mid in calls)
    assert_two_times_rule(model, x, torch.bfloat16)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_input(layout):
    assert_same(network(), image(layout=layout))


def test_batches_in_parts(monkeypatch):
    """Five images, two at once."""
    monkeypatch.setattr(inference, "PIXELS_AT_ONCE", 2 * 12 * 20)
    assert inference.images_at_once((12, 20)) == 2
    for norm in NORMS:
        assert_same(network(norm=norm), image(batch=5))


def test_widths_that_differ_by_node_and_no_bias():
    topology = uf.Topology.nested(
        2, (3, 4, 5), all_heads=True, widths={(0, 2): 7, (1, 1): 2}, up_width=lambda low, level: low // 2 + 1
    )
    for bias in (True, False):
        model = build(uf.Network, topology, 2, norm="batch", bias=bias, deep_supervision=True, backend="cpu").eval()
        assert_same(model, image())


@pytest.mark.parametrize("axes", [2, 3])
def test_batch_norms_whose_variances_are_near_eps(axes):
    """As after training on images that were divided by 255 twice: the scale depends on the exact eps."""
    model = network(axes, norm=("batch", {"eps": 1e-3}))
    for name, buffer in model.named_buffers():
        if name.endswith("running_var"):
            buffer.copy_(1e-3 * torch.rand(buffer.shape, generator=torch.Generator().manual_seed(1)))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        assert_close_relative(model(image(axes)), reference.forward(exact, image(axes).double()), FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_instance_norm_of_maps_far_from_zero(dtype):
    """Variances are not lost beside large means."""
    model = network(norm="instance", depth=1)
    for name, value in model.named_parameters():
        if name.endswith(("conv1.bias", "conv2.bias")):
            value.data += 30
    x = make_input(1, 2, 256, 192)
    with torch.no_grad():
        exact = reference.forward(copy.deepcopy(model).double(), x.double())
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            usual, found = reference.forward(model, x), model(x)
    vectors = [[acceptance.as_vector(outputs)] for outputs in (exact, usual, found)]
    assert acceptance.disagreement(*vectors, dtype) == ""


def test_memory_made_under_inference_mode_serves_later_calls():
    model, x = network(), image()
    with torch.inference_mode():
        outputs = model(x)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(outputs, model(x), strict=True))
