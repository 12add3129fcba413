"""Pruning and prediction: the same numbers as the whole network, and nothing beyond them computed."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from support.helpers import FLOAT32, Recorder, assert_close_relative, build, gradients, make_input
from torch import Tensor
from torch.nn import functional as F

import unetpp_fast as uf

FEATURES = (3, 5, 6, 7)
DEPTH = len(FEATURES) - 1
LEVELS = range(1, DEPTH + 1)
SIZES = {2: (16, 24), 3: (8, 16, 8)}
UPSAMPLES = ["deconv", "nearest", ("linear", {"project": True})]


def deep_model(spatial_dims: int = 2, **options: Any) -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 2, 3, spatial_dims=spatial_dims, features=FEATURES, deep_supervision=True, **options)


def expected_convolutions(levels: range, heads: list[int], batch: int, size: tuple[int, ...], upsample: str) -> Counter:
    """(weight shape, output shape) of every convolution of the nodes with i + j in `levels`, counted by hand."""
    dims, counted = len(size), Counter()
    for i, j in [(d - j, j) for d in levels for j in range(d + 1)]:
        width, pixels = FEATURES[i], tuple(axis // 2**i for axis in size)
        up = 0 if j == 0 else width if upsample == "deconv" else FEATURES[i + 1]
        cin = j * width + up if j else FEATURES[i - 1] if i else 2
        output = (batch, width, *pixels)
        counted[(width, cin, *[3] * dims), output] += 1
        counted[(width, width, *[3] * dims), output] += 1
        if j and upsample == "deconv":
            counted[(FEATURES[i + 1], width, *[2] * dims), output] += 1
    for _ in heads:
        counted[(3, FEATURES[0], *[1] * dims), (batch, 3, *size)] += 1
    return counted


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("norm", [None, "batch", "instance"])
def test_pruned_network_is_the_head_of_the_whole(norm: str | None, upsample: Any, spatial_dims: int, training: bool) -> None:
    model = deep_model(spatial_dims, norm=norm, upsample=upsample).train(training)
    x = make_input(2, 2, *SIZES[spatial_dims])
    heads = model(x)
    for level in LEVELS:
        small = model.prune(level)
        assert small.training == training
        output = small(x)
        assert isinstance(output, Tensor)
        assert torch.equal(output, heads[level - 1])
        assert torch.equal(copy.deepcopy(small)(x), heads[level - 1])


@pytest.mark.parametrize("level", LEVELS)
def test_pruning_shares_parameters_and_computes_nothing(level: int) -> None:
    model = deep_model()
    with Recorder() as recorder:
        small = model.prune(level)
    assert not recorder.operations
    whole = dict(model.named_parameters())
    names = {f"x{i}_{j}" for i in range(level + 1) for j in range(level + 1 - i)}
    expected = {name for name in whole if name.split(".")[0] == "nodes" and name.split(".")[1] in names}
    expected |= {f"heads.x0_{level}.weight", f"heads.x0_{level}.bias"}
    shared = dict(small.named_parameters())
    assert set(shared) == expected
    assert all(parameter is whole[name] for name, parameter in shared.items())
    assert all(value.data_ptr() == model.state_dict()[name].data_ptr() for name, value in small.state_dict().items())


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_pruned_network_runs_the_kept_nodes_alone(level: int, spatial_dims: int, upsample: str) -> None:
    model = deep_model(spatial_dims, upsample=upsample).eval()
    size = SIZES[spatial_dims]
    x = make_input(2, 2, *size)
    with torch.no_grad(), Recorder() as recorder:
        model.prune(level)(x)
    assert recorder.convolutions == expected_convolutions(range(level + 1), [level], 2, size, upsample)
    pools = [count for name, count in recorder.operations.items() if "max_pool" in name]
    assert sum(pools) == level
    smallest = tuple(axis // 2**level for axis in size)
    maps = [shape[2:] for shape in recorder.shapes if len(shape) == spatial_dims + 2 and shape[0] == 2]
    assert min(maps) == smallest


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("level", LEVELS)
def test_predict_computes_what_its_mode_needs(level: int, spatial_dims: int) -> None:
    """fast: one head; accurate: the heads up to the level, on the same nodes."""
    model = deep_model(spatial_dims)
    size = SIZES[spatial_dims]
    x = make_input(1, 2, *size)
    for mode, heads in (("fast", [level]), ("accurate", list(range(1, level + 1)))):
        with Recorder() as recorder:
            model.predict(x, mode=mode, level=level)
        assert recorder.convolutions == expected_convolutions(range(level + 1), heads, 1, size, "deconv")


def test_training_a_pruned_network_trains_the_whole() -> None:
    model = deep_model(norm=None)
    small = model.prune(1)
    x = make_input(1, 2, 16, 16)
    small(x).square().sum().backward()
    assert set(gradients(model)) == {name for name, _ in small.named_parameters()}
    before = model(x)[0]
    torch.optim.SGD(small.parameters(), lr=0.1).step()
    assert not torch.equal(model(x)[0], before)


@pytest.mark.parametrize("maker", [uf.UNetPlusPlus, uf.UNet])
def test_no_head_at_the_level(maker: type) -> None:
    model = build(maker, 2, 1, features=FEATURES)
    for level in (0, 1, 2, 4):
        with pytest.raises(ValueError, match=f"no head at level {level}: .* at level 3; .*deep_supervision=True"):
            model.prune(level)
    x = make_input(1, 2, 16, 16)
    assert torch.equal(model.eval().prune(3)(x), model(x))
    with pytest.raises(ValueError, match=r"this network has heads at level 1, 2, 3$"):
        deep_model().prune(4)


def manual(model: uf.Network, x: Tensor, level: int, mode: str, activation: str) -> Tensor:
    """Prediction spelled out: repeat the border, run, average probabilities, crop. x stays below one step of padding."""
    multiple = 2**level
    padded = x
    for axis in range(2, x.ndim):
        index = torch.arange(x.shape[axis] + -x.shape[axis] % multiple).clamp(max=x.shape[axis] - 1)
        padded = padded.index_select(axis, index)
    columns = [level] if mode == "fast" else range(1, level + 1)
    with torch.no_grad():
        logits = [model.prune(column)(padded) for column in columns]
    each = [head.sigmoid() if activation == "sigmoid" else head.exp() / head.exp().sum(1, keepdim=True) for head in logits]
    mean = sum(each) / len(each)
    return mean[tuple(slice(0, axis) if k > 1 else slice(None) for k, axis in enumerate(x.shape))]


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.parametrize(
    "size", [(1, 1), (1, 40), (7, 129), (33, 50), (16, 24), (1, 1, 1), (3, 17, 9), (8, 16, 8), (5, 1, 12)]
)
def test_predict_any_size(size: tuple[int, ...], mode: str, activation: str) -> None:
    model = deep_model(len(size)).eval()
    x = make_input(2, 2, *size, layout="offset")
    before = x.clone()
    for level in (None, 1, 2, 3):
        probabilities = model.predict(x, mode=mode, level=level, activation=activation)
        assert probabilities.shape == (2, 3, *size)
        assert not probabilities.requires_grad
        assert_close_relative(probabilities, manual(model, x, level or DEPTH, mode, activation), FLOAT32)
    assert torch.equal(x, before)


@pytest.mark.parametrize("maker", [uf.UNetPlusPlus, uf.UNet])
def test_predict_with_one_head(maker: type) -> None:
    """Without deep supervision both modes are that head."""
    model = build(maker, 2, 3, features=FEATURES).eval()
    x = make_input(1, 2, 33, 50)
    with torch.no_grad():
        expected = model(F.pad(x, (0, 6, 0, 7), mode="replicate"))[..., :33, :50].sigmoid()
    for mode in ("accurate", "fast"):
        assert torch.equal(model.predict(x, mode=mode), expected)


@pytest.mark.parametrize("size", [(1, 1), (8, 8), (3, 5), (1, 1, 1), (8, 7, 8)])
def test_predict_with_instance_norm_on_one_value(size: tuple[int, ...]) -> None:
    """Where padding leaves one pixel at the lowest level, one multiple more is added to the last axis."""
    model = deep_model(len(size), norm="instance").eval()
    x = make_input(2, 2, *size)
    missing = [amount for axis in reversed(size) for amount in (0, 8 - axis)]
    missing[1] += 8
    with torch.no_grad():
        expected = [head.sigmoid() for head in model(F.pad(x, missing, mode="replicate"))]
    expected = (sum(expected) / 3)[(..., *(slice(0, axis) for axis in size))]
    assert_close_relative(model.predict(x), expected, FLOAT32)


def test_predict_empty_batch() -> None:
    assert deep_model().predict(torch.zeros(0, 2, 7, 9)).shape == (0, 3, 7, 9)


def test_softmax_sums_to_one_and_sigmoid_does_not() -> None:
    model = deep_model()
    x = make_input(2, 2, 9, 9)
    ones = torch.ones(2, 9, 9)
    assert_close_relative(model.predict(x, activation="softmax").sum(1), ones, FLOAT32)
    assert not torch.allclose(model.predict(x).sum(1), ones)


@pytest.mark.parametrize("mode", ["accurate", "fast"])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_probabilities_of_half_precision_are_float32(activation: str, mode: str) -> None:
    """Three digits of a bfloat16 probability would decide which side of a threshold a pixel is on."""
    model = deep_model().eval()
    x = make_input(1, 2, 16, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        heads = [head.double() for head in model(x)][-1 if mode == "fast" else 0 :]
        probabilities = model.predict(x, mode=mode, activation=activation)
    each = [head.sigmoid() if activation == "sigmoid" else head.softmax(1) for head in heads]
    assert probabilities.dtype == torch.float32
    assert_close_relative(probabilities, sum(each) / len(each), FLOAT32)
    assert model.to(torch.bfloat16).predict(x.bfloat16(), activation=activation).dtype == torch.float32
    assert model.double().predict(x.double(), activation=activation).dtype == torch.float64


def test_predict_leaves_the_model_as_it_was() -> None:
    """Modes, frozen submodules included, running statistics, gradients; with every image predicted in eval mode."""
    model = deep_model(dropout=0.5).train()
    model.nodes["x1_0"].eval()
    model.nodes["x0_2"].norm1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    x = make_input(1, 2, 20, 20)
    first = model.predict(x)
    assert torch.equal(model.predict(x), first)
    assert torch.equal(copy.deepcopy(model).eval().predict(x), first)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_predict_restores_the_modes_after_an_error() -> None:
    model = deep_model().train()
    model.nodes["x0_1"].eval()

    def fail(module, inputs) -> None:
        raise RuntimeError("on purpose")

    model.nodes["x2_1"].conv2.register_forward_pre_hook(fail)
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="on purpose"):
        model.predict(make_input(1, 2, 8, 8))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.predict(make_input(1, 2, 8, 8), level=2, mode="fast").shape == (1, 3, 8, 8)
