"""The models against equation 1 written out by hand: values, gradients, precision, memory layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.helpers import (
    FLOAT32,
    FLOAT64,
    LAYOUTS,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    max_error,
    weighted_sum,
)
from support.oracle import Oracle
from torch import Tensor, nn

import unetpp_fast as uf

NORMS = [None, "batch", "instance"]
UPSAMPLES = [
    "deconv",
    "nearest",
    "linear",
    ("linear", {"align_corners": True}),
    ("linear", {"align_corners": True, "project": True}),
    ("nearest", {"project": True}),
]
FEATURES = (4, 6, 9)
SIZES = {2: (8, 20), 3: (4, 12, 8)}


def oracle_of(model: uf.Network, state: dict[str, Tensor] | None = None) -> Oracle:
    upsample, norm = model.options["upsample"], model.options["norm"]
    name, keywords = (upsample, {}) if isinstance(upsample, str) else upsample
    act = model.options["act"]
    slope = 0.0 if act == "relu" else act[1]["negative_slope"]
    state = dict(model.state_dict()) if state is None else state
    return Oracle(state, norm=norm, slope=slope, upsample=name, up=keywords, training=model.training)


def differentiable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that gather gradients, and of the buffers."""
    leaves = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    return {**{name: buffer.clone() for name, buffer in model.named_buffers()}, **leaves}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_unetplusplus_is_equation_1(norm: str | None, upsample: Any, spatial_dims: int, training: bool) -> None:
    """Outputs of both heads and all gradients of the three-level network, in double precision."""
    model = build(
        uf.UNetPlusPlus, 2, 3, spatial_dims=spatial_dims, features=FEATURES, norm=norm,
        act=("leaky_relu", {"negative_slope": 0.1}), upsample=upsample, deep_supervision=True,
    )  # fmt: skip
    model = model.double().train(training)
    x = make_input(2, 2, *SIZES[spatial_dims], dtype=torch.float64).requires_grad_()
    state = differentiable_state(model)
    z = x.detach().clone().requires_grad_()
    expected = oracle_of(model, state).nested_depth_2(z)
    weighted_sum(expected).backward()
    outputs = model(x)
    weighted_sum(outputs).backward()
    assert_close_relative(outputs, expected, FLOAT64)
    assert_close_relative(x.grad, z.grad, FLOAT64)
    assert_gradients_close(gradients(model), {k: v.grad for k, v in state.items() if v.requires_grad}, FLOAT64)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
def test_unet(upsample: Any, spatial_dims: int) -> None:
    model = build(uf.UNet, 2, 3, spatial_dims=spatial_dims, features=FEATURES, upsample=upsample).double()
    x = make_input(2, 2, *SIZES[spatial_dims], dtype=torch.float64)
    expected = oracle_of(model).plain_depth_2(x)
    assert_close_relative(model(x), expected, FLOAT64)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    "depth, size", [(1, (2, 6)), (3, (8, 40)), (4, (16, 48)), (4, (48, 16)), (3, (8, 8, 16)), (4, (16, 16, 32))]
)
def test_any_depth_and_lowest_maps_one_pixel_wide(depth: int, size: tuple[int, ...], norm: str | None) -> None:
    model = build(
        uf.UNetPlusPlus, 1, 2, spatial_dims=len(size), features=(3, 4, 5, 6, 7)[: depth + 1], norm=norm,
        upsample=("linear", {"align_corners": True}), deep_supervision=True,
    )  # fmt: skip
    model = model.double()
    x = make_input(2, 1, *size, dtype=torch.float64)
    assert_close_relative(model(x), oracle_of(model).nested(x, depth), FLOAT64)


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_eps_reaches_every_norm(norm: str) -> None:
    """An eps beside which the variance is small shows that none keeps the default."""
    model = build(uf.UNetPlusPlus, 1, 1, features=FEATURES, norm=(norm, {"eps": 0.7}), deep_supervision=True).double()
    x = make_input(2, 1, 8, 8, dtype=torch.float64)
    expected = Oracle(model.state_dict(), norm=norm, eps=0.7).nested_depth_2(x)
    assert_close_relative(model(x), expected, FLOAT64)


@pytest.mark.parametrize("upsample", UPSAMPLES, ids=str)
@pytest.mark.parametrize("spatial_dims, size", [(2, (4, 8)), (3, (4, 4, 8))])
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm: str | None, spatial_dims: int, size: tuple[int, ...], upsample: Any) -> None:
    """Derivatives by every parameter and the input against finite differences, with steps so small that none of the
    thousands of kinks (activations at 0, pooling ties) lies within one."""
    model = build(
        uf.UNetPlusPlus, 1, 2, spatial_dims=spatial_dims, features=(2, 2, 3), norm=norm,
        act=("leaky_relu", {"negative_slope": 0.2}), upsample=upsample, deep_supervision=True,
    )  # fmt: skip
    model = model.double()
    names = [name for name, _ in model.named_parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, parameters, strict=True))
        return tuple(torch.func.functional_call(model, values, (x,)))

    x = make_input(2, 1, *size, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *model.parameters()), eps=1e-8, fast_mode=True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("upsample", ["deconv", "nearest", ("linear", {"align_corners": True})], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_autocast_loses_no_more_than_the_formula_does(norm: str | None, upsample: Any, training: bool) -> None:
    """In bfloat16 the error against float64 is at most twice that of the hand-written network in bfloat16."""
    model = build(uf.UNetPlusPlus, 2, 1, features=FEATURES, norm=norm, upsample=upsample, deep_supervision=True)
    model.train(training)
    x = make_input(2, 2, 16, 24)
    oracle = oracle_of(model)
    with torch.no_grad():
        wide = {name: value.double() for name, value in oracle.state.items()}
        exact = oracle_of(model, wide).nested_depth_2(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            outputs, plain = model(x), oracle.nested_depth_2(x)
    for ours, theirs, truth in zip(outputs, plain, exact, strict=True):
        assert ours.dtype == torch.bfloat16
        assert 0 < max_error(ours, truth) <= 2 * max_error(theirs, truth)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layouts(layout: str, norm: str | None, spatial_dims: int) -> None:
    """Values and gradients are those of a contiguous copy, and the input is only read."""
    model = build(uf.UNetPlusPlus, 2, 1, spatial_dims=spatial_dims, features=FEATURES, norm=norm, deep_supervision=True)
    x = make_input(3, 2, *SIZES[spatial_dims], layout=layout)
    before = x.clone(memory_format=torch.contiguous_format)
    straight = before.clone().requires_grad_()
    expected = model(straight)
    weighted_sum(expected).backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    leaf = x.detach().requires_grad_()
    outputs = model(leaf)
    weighted_sum(outputs).backward()
    assert_close_relative(outputs, expected, FLOAT32)
    assert_close_relative(leaf.grad, straight.grad, FLOAT32)
    assert_gradients_close(gradients(model), expected_gradients, FLOAT32)
    assert torch.equal(x, before)
    assert_close_relative(model.predict(x[..., :-1]), model.predict(before[..., :-1]), FLOAT32)
    assert torch.equal(x, before)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_channels_last_model(spatial_dims: int) -> None:
    layout = torch.channels_last if spatial_dims == 2 else torch.channels_last_3d
    model = build(uf.UNetPlusPlus, 2, 1, spatial_dims=spatial_dims, features=FEATURES).eval()
    x = make_input(2, 2, *SIZES[spatial_dims])
    with torch.no_grad():
        expected = model(x)
        outputs = model.to(memory_format=layout)(x.to(memory_format=layout))
    assert_close_relative(outputs, expected, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_model_in_another_precision(dtype: torch.dtype) -> None:
    model = build(uf.UNetPlusPlus, 1, 2, features=FEATURES, norm=None, deep_supervision=True)
    x = make_input(2, 1, 8, 8)
    with torch.no_grad():
        exact = oracle_of(model, {k: v.double() for k, v in model.state_dict().items()}).nested_depth_2(x.double())
        outputs = model.to(dtype)(x.to(dtype))
        plain = oracle_of(model).nested_depth_2(x.to(dtype))
    for ours, theirs, truth in zip(outputs, plain, exact, strict=True):
        assert ours.dtype == dtype
        assert max_error(ours, truth) <= 2 * max_error(theirs, truth) + FLOAT64
