"""Networks whose strides and kernels differ between axes: sizes, pruning, prediction, operations, checkpoints, errors.

Their outputs and gradients are compared with another implementation's in tests/converters/test_nnunet.py.
"""

from __future__ import annotations

import pytest
import torch
from support import cpu_kernels
from support.fused_cases import assert_same_inference, assert_same_passes
from support.helpers import FLOAT32, Recorder, assert_close_relative, build, make_input, weighted_sum

import unetpp_fast as uf
from unetpp_fast.architecture.options import reduces_channels

SHAPES = {"strides": [(1, 2, 2), (2, 2, 2)], "kernels": [(1, 3, 3), (1, 3, 3), (3, 3, 3)]}


def network(**options) -> uf.UNetPlusPlus:
    options = {"features": (4, 6, 5), "deep_supervision": True, "spatial_dims": 3, **SHAPES, **options}
    return build(uf.UNetPlusPlus, 2, 3, **options)


@pytest.mark.parametrize("upsample", ["deconv", "nearest", ("linear", {"align_corners": True, "project": True})], ids=str)
def test_every_map_has_its_size_and_the_operations_are_counted(upsample):
    model, x = network(upsample=upsample).eval(), make_input(1, 2, 6, 8, 12)
    assert model.multiple == 4 and model.multiples == (2, 4, 4)
    with Recorder() as recorder, torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        assert [head.shape for head in model(x)] == [(1, 3, 6, 8, 12)] * 2
    sizes = {output[2:] for _, output in recorder.convolutions.elements()}
    assert {(6, 8, 12), (6, 4, 6), (3, 2, 3)} <= sizes
    assert model.gflop((6, 8, 12)) == pytest.approx(1e-9 * counter.get_total_flops())


KERNELS = [(1, 3, 3), (1, 3, 3), (3, 3, 3), (3, 3, 3)]  # the third level begins with a kernel of 3 and a stride of 1
ENGINE = [
    {"upsample": ("deconv", {"bias": False}), "norm": "instance", "downsample": "stride"},
    {"upsample": "nearest", "norm": None}, {"upsample": "linear", "downsample": "stride", "norm": None},
    {"upsample": ("linear", {"project": True})}, {"downsample": "stride"},
]  # fmt: skip


@pytest.mark.parametrize("options", ENGINE, ids=str)
@pytest.mark.parametrize("ops", ["naive", pytest.param("cpu", marks=cpu_kernels.needs_library())])
def test_the_engine_against_the_reference(ops, options):
    """Outputs, every gradient and running statistics; with and without a backward pass."""
    up = None if reduces_channels(options.get("upsample", "deconv")) else lambda low, level: low
    topology = uf.Topology.nested(2, (4, 6, 5, 3), spatial_dims=3, all_heads=True, up_width=up)
    topology = topology.over_levels([(1, 2, 2), (1, 2, 2), (2, 2, 2)], KERNELS)
    model = build(uf.Network, topology, 3, deep_supervision=True, **options)
    x = make_input(2, 2, 4, 16, 16)
    exact = ops == "naive"
    model, x = (model.double(), x.double()) if exact else (model, x)
    assert_same_passes(model, x, ops, bound=1e-9 if exact else 1e-4)
    assert_same_inference(model.eval(), x, ops, bound=1e-9 if exact else 10 * FLOAT32)
    assert_same_inference(model, x[:0], ops)
    assert model.structure.unsupported["triton"] == (
        "strides and kernels that differ between axes run on the reference on a GPU"
    )


def test_pruned_and_predicted_at_any_size():
    model = network().eval()
    x = make_input(1, 2, 4, 8, 8)
    assert torch.equal(model.prune(1)(x), model(x)[0]) and model.prune(1).multiples == (1, 2, 2)
    any_size = make_input(1, 2, 5, 7, 9)
    expected = model(torch.nn.functional.pad(any_size, (0, 3, 0, 1, 0, 1), mode="replicate"))
    assert_close_relative(model.predict(any_size, "fast"), expected[-1][..., :5, :7, :9].sigmoid(), FLOAT32)
    tiled = uf.predict_tiled(model, make_input(1, 2, 6, 12, 9), tile=(2, 8, 8), mode="fast")
    assert tiled.shape == (1, 3, 6, 12, 9) and torch.isfinite(tiled).all()
    whole = make_input(1, 2, 6, 12, 9)
    assert_close_relative(uf.predict_tiled(model, whole, max_memory="1G"), model.predict(whole), FLOAT32)
    with pytest.raises(ValueError, match=r"tile must be a positive multiple of \(2, 4, 4\), or 3 of them"):
        uf.predict_tiled(model, whole, tile=(3, 8, 8))


def test_it_trains_and_is_built_again_from_its_config():
    model, x = network(norm="instance"), make_input(2, 2, 2, 8, 4)
    weighted_sum(model(x)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    again = uf.Network.from_config(model.config)
    again.load_state_dict(model.state_dict())
    assert all(map(torch.equal, again(x), model(x))) and again.config == model.config
    fast = uf.optimize(model.eval())
    assert_close_relative(fast(x), [head.detach() for head in model(x)], FLOAT32)


def test_usual_strides_and_kernels_are_those_of_a_usual_network():
    usual = build(uf.UNetPlusPlus, 2, 3, features=(4, 6))
    same = build(uf.UNetPlusPlus, 2, 3, features=(4, 6), strides=[(2, 2)], kernels=[(3, 3)] * 2)
    assert same.topology == usual.topology and same.config == usual.config and same.structure is usual.structure


@pytest.mark.parametrize(("options", "says"), [
    ({"strides": [(1, 2, 2)]}, "strides must be 2 tuples of 3 numbers, each 1 or 2, one per axis"),
    ({"strides": [(1, 2), (2, 2)]}, "strides must be 2 tuples of 3 numbers"),
    ({"strides": [(1, 3, 3), (2, 2, 2)]}, "each 1 or 2"),
    ({"kernels": [(1, 5, 5)] * 3}, "kernels must be 3 tuples of 3 numbers, each 1 or 3"),
    ({"kernels": 3}, "kernels must be 3 tuples"),
    ({"upsample": "pixelshuffle"}, "pixelshuffle doubles every axis"),
], ids=str)  # fmt: skip
def test_bad_shapes_are_one_clear_error(options, says):
    with pytest.raises(ValueError, match=says):
        network(**options)
