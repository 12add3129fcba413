"""MONAI's BasicUNetPlusPlus, an independent implementation, gives the same outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import FLOAT32, assert_close_relative, assert_gradients_close, build, gradients, make_input, weighted_sum
from monai_weights import carry_over, network_like_monai, our_name, renamed, without_counterpart

from unetpp_fast import Network

nets = pytest.importorskip("monai.networks.nets", reason="MONAI, the independent implementation, is not installed")

EVEN = (4, 4, 8, 12, 16, 6)
ODD = (5, 6, 10, 14, 18, 7)
ODDER = (3, 5, 7, 9, 11, 4)
SIZES = {2: (32, 48), 3: (32, 16, 32)}
NORMS = {"batch": "batch", "instance": ("instance", {"affine": True})}
LEAKY = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})


def pair(
    spatial_dims: int,
    features: tuple[int, ...],
    upsample: str,
    norm: str,
    deep_supervision: bool,
    act: Any = LEAKY,
    bias: bool = True,
) -> tuple[torch.nn.Module, Network]:
    """MONAI's network with random weights, and ours with the same ones."""
    shared = {"spatial_dims": spatial_dims, "features": features, "upsample": upsample, "bias": bias}
    monai = build(nets.BasicUNetPlusPlus, in_channels=2, out_channels=3, deep_supervision=deep_supervision,
                  norm=NORMS[norm], act=act, seed=1, **shared)  # fmt: skip
    ours = build(network_like_monai, 2, 3, deep_supervision=deep_supervision, norm=norm,
                 act="relu" if act == "relu" else ("leaky_relu", {"negative_slope": 0.1}), seed=2, **shared)  # fmt: skip
    carry_over(monai, ours)
    return monai, ours


def assert_same(monai: torch.nn.Module, ours: Network, x: torch.Tensor) -> None:
    """Outputs, input gradient, every parameter's gradient, and the buffers afterwards."""
    theirs, mine = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, outputs = monai(theirs), ours(mine)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert_close_relative(outputs, expected, FLOAT32)
    weighted_sum(expected).backward()
    weighted_sum(outputs).backward()
    assert_close_relative(mine.grad, theirs.grad, FLOAT32)
    got = gradients(ours)
    extra = {name: got.pop(name) for name in without_counterpart(ours)}
    assert_gradients_close(got, renamed(gradients(monai), ours), FLOAT32)
    assert set(got) | set(extra) == {name for name, _ in ours.named_parameters()}
    buffers = dict(ours.named_buffers())
    for name, value in monai.named_buffers():
        assert_close_relative(buffers[our_name(name)], value, FLOAT32)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("deep_supervision", [True, False], ids=["4heads", "1head"])
@pytest.mark.parametrize("features", [EVEN, ODD], ids=["even", "odd"])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("upsample", ["deconv", "nontrainable"])
def test_2d(upsample: str, norm: str, features: tuple, deep_supervision: bool, training: bool, batch: int) -> None:
    monai, ours = pair(2, features, upsample, norm, deep_supervision)
    assert_same(monai.train(training), ours.train(training), make_input(batch, 2, *SIZES[2]))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("norm", ["batch", "instance"])
@pytest.mark.parametrize("upsample", ["deconv", "nontrainable"])
@pytest.mark.parametrize("deep_supervision", [True, False], ids=["4heads", "1head"])
def test_3d(deep_supervision: bool, upsample: str, norm: str, batch: int) -> None:
    """In training, for one image and three."""
    monai, ours = pair(3, ODDER if batch == 1 else EVEN, upsample, norm, deep_supervision)
    assert_same(monai, ours, make_input(batch, 2, *SIZES[3]))


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_3d_in_eval(norm: str) -> None:
    monai, ours = pair(3, ODD, "nontrainable", norm, True)
    assert_same(monai.eval(), ours.eval(), make_input(1, 2, *SIZES[3]))


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_relu_and_bias(bias: bool, spatial_dims: int) -> None:
    monai, ours = pair(spatial_dims, ODDER, "deconv", "batch", True, act="relu", bias=bias)
    assert (ours.nodes["x0_0"].conv1.bias is not None) == bias
    assert_same(monai, ours, make_input(2, 2, *SIZES[spatial_dims]))


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_empty_batch(spatial_dims: int) -> None:
    """With batch norm in eval; MONAI's instance norm fails on an empty batch, ours gives empty maps."""
    monai, ours = pair(spatial_dims, ODD, "deconv", "batch", True)
    empty = torch.zeros(0, 2, *SIZES[spatial_dims])
    outputs, expected = ours.eval()(empty), monai.eval()(empty)
    assert [output.shape for output in outputs] == [output.shape for output in expected]


def test_a_pruned_network_is_monais_head() -> None:
    monai, ours = pair(2, ODD, "nontrainable", "batch", True)
    x = make_input(1, 2, *SIZES[2])
    expected = monai.eval()(x)
    for level in (1, 2, 3, 4):
        assert_close_relative(ours.eval().prune(level)(x), expected[level - 1], FLOAT32)


def test_the_mapping_is_one_to_one() -> None:
    """Names that map, names that cannot, and the convolutions that only one side has."""
    monai, ours = pair(2, ODD, "nontrainable", "batch", True)
    names = [our_name(name) for name in monai.state_dict()]
    assert len(set(names)) == len(names)
    extra = without_counterpart(ours)
    assert set(names) | extra == set(ours.state_dict())
    assert len(extra) == 8 and not extra & set(names)
    assert without_counterpart(pair(2, ODD, "deconv", "batch", True)[1]) == set()
    with pytest.raises(KeyError, match="no such weight"):
        our_name("conv_0_0.attention.weight")
