"""Networks from the outside: parameter counts, shapes over the options, initial weights, dropout, saving."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, build, make_input, weighted_sum
from torch import nn

import unetpp_fast as uf
from unetpp_fast import Network, Topology

NORMS = [None, "batch", "instance", ("batch", {"eps": 1e-3, "momentum": 0.3}), ("instance", {"eps": 1e-3})]
ACTS = ["relu", ("leaky_relu", {"negative_slope": 0.01})]
UPSAMPLES = [
    "deconv",
    "nearest",
    "linear",
    ("linear", {"align_corners": True}),
    ("linear", {"align_corners": False, "project": True}),
    ("nearest", {"project": True}),
]


def on_meta(maker, *args, **options) -> nn.Module:
    """A network with shapes and no memory."""
    with torch.device("meta"):
        return maker(*args, **options)


def test_parameter_counts_of_the_paper() -> None:
    """Table 2 of the paper and the numbers its code gives."""
    count = uf.parameter_count
    assert count(on_meta(uf.from_paper, "unet")) == 7_759_521
    assert count(on_meta(uf.from_paper, "unet++")) == 9_041_601
    # The paper prints 9.13 M for the wide U-Net; no variant of the architecture gives that number.
    assert count(on_meta(uf.from_paper, "wide_unet")) == 9_282_246
    model = on_meta(uf.from_paper, "unet++", deep_supervision=True)
    assert count(model) == 9_041_700
    assert [count(model.prune(level)) for level in (1, 2, 3, 4)] == [100_961, 511_105, 2_204_961, 9_041_601]


def test_parameter_count_of_the_widest_used_layout() -> None:
    """pytorch-nested-unet: batch norm, bilinear with aligned corners, all channels passed on."""
    model = on_meta(uf.UNetPlusPlus, 3, 1, upsample=("linear", {"align_corners": True}))
    assert uf.parameter_count(model) == 9_163_329
    assert uf.parameter_count(model.requires_grad_(False)) == 0


def test_from_paper_options() -> None:
    model = on_meta(uf.from_paper, "unet++", 2, 3, 3, True)
    assert isinstance(model, uf.UNetPlusPlus)
    assert model.topology.spatial_dims == 3 and model.topology.in_channels == 2 and model.out_channels == 3
    assert model.topology.heads == (1, 2, 3, 4)
    expected = {"norm": None, "act": "relu", "upsample": "deconv", "dropout": 0.5, "bias": True, "head_bias": True}
    assert model.options == {**expected, "downsample": "pool", "odd_sizes": False}
    assert isinstance(on_meta(uf.from_paper, "wide_unet"), uf.UNet)
    with pytest.raises(ValueError, match=r"from_paper knows \['unet', 'unet\+\+', 'wide_unet'\], not 'vnet'"):
        uf.from_paper("vnet")
    with pytest.raises(ValueError, match="deep_supervision needs the nested nodes"):
        uf.from_paper("unet", deep_supervision=True)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("act", ACTS, ids=str)
@pytest.mark.parametrize("norm", NORMS, ids=str)
def test_shapes_over_the_options(norm: Any, act: Any, upsample: Any, spatial_dims: int) -> None:
    """Odd widths; train and eval alike; a gradient for every parameter."""
    options = {"spatial_dims": spatial_dims, "features": (3, 5, 7), "norm": norm, "act": act, "upsample": upsample}
    size = (8, 12, 4)[:spatial_dims]
    x = make_input(3, 2, *size)
    for model in (
        build(uf.UNetPlusPlus, 2, 3, deep_supervision=True, **options),
        build(uf.UNetPlusPlus, 2, 3, **options),
        build(uf.UNet, 2, 3, **options),
    ):
        heads = 2 if getattr(model, "deep_supervision", False) else None
        for training in (True, False):
            outputs = model.train(training)(x)
            assert isinstance(outputs, list) == bool(heads)
            outputs = outputs if heads else [outputs]
            assert [tuple(output.shape) for output in outputs] == [(3, 3, *size)] * (heads or 1)
            assert all(torch.isfinite(output).all() for output in outputs)
        weighted_sum(outputs).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("norm", NORMS[:3])
def test_shapes_over_depth_and_batch(
    norm: str | None, depth: int, spatial_dims: int, batch: int, deep_supervision: bool
) -> None:
    model = build(
        uf.UNetPlusPlus, 1, 2, spatial_dims=spatial_dims, features=(3, 2, 5, 1, 3)[: depth + 1], norm=norm,
        deep_supervision=deep_supervision,
    )  # fmt: skip
    size = (2**depth, 2 ** (depth + 1), 2**depth)[:spatial_dims]
    for training in (True, False):
        outputs = model.train(training)(torch.zeros(batch, 1, *size))
        outputs = outputs if deep_supervision else [outputs]
        assert [tuple(output.shape) for output in outputs] == [(batch, 2, *size)] * (depth if deep_supervision else 1)


@pytest.mark.parametrize("norm", NORMS[:3])
def test_empty_batch_has_zero_gradients_and_leaves_statistics(norm: str | None) -> None:
    model = build(uf.UNetPlusPlus, 1, 1, features=(2, 3, 4), norm=norm, deep_supervision=True)
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}
    x = torch.zeros(0, 1, 8, 8, requires_grad=True)
    weighted_sum(model(x)).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    assert x.grad.shape == x.shape
    assert all(torch.equal(dict(model.named_buffers())[name], value) for name, value in before.items())


def test_heads_come_shallowest_first_and_without_deep_supervision_the_deepest_is_left() -> None:
    model = build(uf.UNetPlusPlus, 1, 1, features=(2, 3, 4), deep_supervision=True).eval()
    single = build(uf.UNetPlusPlus, 1, 1, features=(2, 3, 4), seed=1).eval()
    single.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("heads.x0_1")})
    x = make_input(1, 1, 8, 8)
    shallow, deep = model(x)
    assert torch.equal(single(x), deep)
    with torch.no_grad():
        model.heads["x0_1"].bias += 1
    assert_close_relative(model(x)[0], shallow + 1, FLOAT32)
    assert torch.equal(model(x)[1], deep)


def test_initial_weights_keep_the_variance() -> None:
    """He et al. (2015), eq. 14: std = gain / sqrt(fan in); biases 0. With the deconv, fan in is its channel count."""
    slope = 0.5
    torch.manual_seed(0)
    model = uf.UNetPlusPlus(8, 64, features=(64, 64), norm=None, act=("leaky_relu", {"negative_slope": slope}))
    gain = math.sqrt(2 / (1 + slope**2))
    node = model.nodes["x0_1"]
    expected = {
        node.conv1: gain / math.sqrt(9 * 128), node.conv2: gain / math.sqrt(9 * 64),
        node.up: 1 / math.sqrt(64), model.heads["x0_1"]: 1 / math.sqrt(64),
    }  # fmt: skip
    for layer, std in expected.items():
        several_sigma = 5 / math.sqrt(2 * layer.weight.numel())
        assert abs(layer.weight.std().item() / std - 1) < several_sigma
        assert not layer.bias.any()


def test_dropout_follows_each_activation_and_rests_in_eval() -> None:
    options = {"features": (8, 16), "norm": "instance", "act": ("leaky_relu", {"negative_slope": 0.5})}
    model = build(uf.UNetPlusPlus, 1, 1, dropout=0.25, **options)
    still = build(uf.UNetPlusPlus, 1, 1, **options)
    x = make_input(2, 1, 64, 64)
    assert torch.equal(model.eval()(x), still(x))
    seen: list[torch.Tensor] = []
    model.nodes["x0_0"].conv2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model.nodes["x0_1"].conv1.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][:, :8]))
    torch.manual_seed(0)
    first = model.train()(x)
    torch.manual_seed(0)
    assert torch.equal(model(x), first)
    assert not torch.equal(model(x), first)
    kept = still.nodes["x0_0"]
    first_map = seen[0]
    assert abs((first_map == 0).float().mean().item() - 0.25) < 5 / math.sqrt(first_map.numel())
    assert abs((seen[1] == 0).float().mean().item() - 0.25) < 5 / math.sqrt(seen[1].numel())
    undropped = kept.act(kept.norm1(kept.conv1(x)))
    assert_close_relative(first_map, torch.where(first_map == 0, 0.0, undropped / 0.75), FLOAT32)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
def test_config_and_state_dict_rebuild_the_network(upsample: Any, norm: Any, bias: bool) -> None:
    topology = Topology.nested(
        2, (4, 6, 9), all_heads=True, widths={(0, 2): 5},
        up_width=(lambda low, level: low) if upsample in ("nearest", "linear", UPSAMPLES[3]) else lambda low, level: 3,
    )  # fmt: skip
    model = build(
        Network, topology, 3, norm=norm, act=ACTS[1], upsample=upsample, dropout=0.1, bias=bias, deep_supervision=True
    )
    again = build(Network.from_config, json.loads(json.dumps(model.config)), seed=5)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    x = make_input(2, 2, 8, 12)
    assert again.config == json.loads(json.dumps(model.config)) == json.loads(json.dumps(again.config))
    for ours, theirs in zip(again.eval()(x), model.eval()(x), strict=True):
        assert torch.equal(ours, theirs)
    assert (model.nodes["x0_0"].conv1.bias is not None) == bias


def test_config_of_subclasses_and_pruned_networks() -> None:
    x = make_input(2, 2, 8, 12)
    nested = build(uf.UNetPlusPlus, 2, 1, features=(4, 6, 9), deep_supervision=True)
    for model in (nested, nested.prune(1), build(uf.UNet, 2, 1, features=(4, 6, 9), upsample="linear")):
        again = Network.from_config(json.loads(json.dumps(model.config)))
        again.load_state_dict(model.state_dict())
        outputs, expected = again.eval()(x), model.eval()(x)
        assert all(map(torch.equal, outputs, expected)) if isinstance(expected, list) else torch.equal(outputs, expected)


def test_state_dict_keys() -> None:
    """Checkpoints depend on these names."""
    keys = set(uf.UNetPlusPlus(1, 1, features=(2, 3)).state_dict())
    parts = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"]
    parts += [
        f"norm{k}.{what}"
        for k in (1, 2)
        for what in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    expected = {f"nodes.{node}.{part}" for node in ("x0_0", "x1_0", "x0_1") for part in parts}
    expected |= {f"{layer}.{what}" for layer in ("nodes.x0_1.up", "heads.x0_1") for what in ("weight", "bias")}
    assert keys == expected


def test_networks_describe_themselves() -> None:
    model = uf.UNetPlusPlus(1, 1, features=(2, 3, 4), norm="instance", upsample="linear", deep_supervision=True)
    text = repr(model)
    for part in ("depth=2, heads: X(0,1), X(0,2)", "mode=bilinear, align_corners=False", "InstanceNorm(2, eps=1e-05)"):
        assert part in text
    assert math.isclose(model.gflop((8, 8)), model.topology.gflop((8, 8), out_channels=1))
