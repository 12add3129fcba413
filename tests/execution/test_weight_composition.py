"""Composed weights against the up-sampling and convolution that they stand for, borders included, in float64."""

from __future__ import annotations

import pytest
import torch
from support.helpers import FLOAT64, Recorder, assert_close_relative
from torch.nn import functional as F

from unetpp_fast.execution.plan import weight_composition
from unetpp_fast.kernels import naive


def maps(axes: int, channels: int, size: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, channels, *size[-axes:], generator=generator, dtype=torch.float64)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    """`[N, C, *S]` as `[N, D, H, W, C]`."""
    return (x[:, :, None] if x.ndim == 4 else x).movedim(1, -1).contiguous()


CONV = {2: F.conv2d, 3: F.conv3d}
DECONV = {2: F.conv_transpose2d, 3: F.conv_transpose3d}


@pytest.mark.parametrize("elements", [None, (1, 1000)])
def test_the_example_of_one_axis(elements):
    """The four sums of the module's docstring: phase 0, then phase 1, each for the left and the right pixel."""
    weight = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)
    u0, u1 = elements or (1, 1)
    up = None if elements is None else torch.tensor(elements, dtype=torch.float64).view(1, 1, 2)
    phases = weight_composition.phase_weights(weight.view(1, 1, 3), up)
    assert phases.flatten(1).tolist() == [[1 * u1, 10 * u0 + 100 * u1], [1 * u0 + 10 * u1, 100 * u0]]


@pytest.mark.parametrize("kind", ["nearest", "project", "deconv"])
@pytest.mark.parametrize(("axes", "size"), [(2, (1, 1)), (2, (3, 5)), (3, (1, 2, 1)), (3, (2, 3, 2))])
def test_phases_are_the_convolution_of_the_upsampled_map(axes, size, kind):
    prefix, low = maps(axes, 3, tuple(2 * n for n in size), 0), maps(axes, 4, size, 1)
    width = 4 if kind == "nearest" else 5
    weight, bias = (
        maps(axes, 3 + width, (3,) * axes, 2).repeat(3, *[1] * (axes + 1)),
        maps(axes, 6, (1,) * axes, 3)[0].flatten(),
    )
    weight = weight + 0.1 * torch.arange(6.0).view(-1, *[1] * (axes + 1))
    up_bias = maps(axes, width, (1,) * axes, 4)[0].flatten()
    if kind == "deconv":
        up = maps(axes, width, (2,) * axes, 5).repeat(2, *[1] * (axes + 1))
        upsampled = DECONV[axes](low, up, up_bias, stride=2)
    elif kind == "project":
        up = maps(axes, width, (1,) * axes, 5).repeat(2, *[1] * (axes + 1))
        upsampled = F.interpolate(CONV[axes](low, up.transpose(0, 1), up_bias), scale_factor=2)
    else:
        up, up_bias = None, None
        upsampled = F.interpolate(low, scale_factor=2)
    expected = channels_last(CONV[axes](torch.cat([prefix, upsampled], 1), weight, bias, padding=1))
    operands = weight_composition.first_operands(weight, bias, 3, "phases", up, up_bias)
    out = torch.full_like(expected, torch.nan)
    naive.conv(
        out, channels_last(prefix), operands.wa, axes=axes, phased=True, stride=2, b=channels_last(low), wb=operands.wb,
        bias=operands.bias, border=operands.border,
    )  # fmt: skip
    assert_close_relative(out, expected, FLOAT64)


@pytest.mark.parametrize(("axes", "size"), [(2, (1, 3)), (3, (2, 1, 3))])
def test_data_gradients_are_convolutions_of_the_output_gradient(axes, size):
    low = maps(axes, 4, size, 1).requires_grad_()
    prefix = maps(axes, 3, tuple(2 * n for n in size), 0).requires_grad_()
    weight = maps(axes, 7, (3,) * axes, 2).repeat(3, *[1] * (axes + 1))
    out = CONV[axes](torch.cat([prefix, F.interpolate(low, scale_factor=2)], 1), weight, padding=1)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    g_prefix, g_low = torch.autograd.grad(out, (prefix, low), dy)
    operands = weight_composition.first_operands(weight, None, 3, "phases")
    dy = channels_last(dy)
    out = torch.empty_like(channels_last(g_prefix))
    naive.conv(out, dy, weight_composition.flipped(operands.wa), axes=axes)
    assert_close_relative(out, channels_last(g_prefix), FLOAT64)
    out = torch.empty_like(channels_last(g_low))
    naive.conv(out, dy, weight_composition.gathered(operands.wb, axes), axes=axes, taps=4, stride=2)
    assert_close_relative(out, channels_last(g_low), FLOAT64)


@pytest.mark.parametrize(("axes", "size"), [(2, (1, 3)), (3, (2, 1, 3))])
def test_gradients_of_a_strided_convolution_are_those_of_phases_with_swapped_roles(axes, size):
    x = maps(axes, 3, tuple(2 * n for n in size), 0).requires_grad_()
    weight = maps(axes, 3, (3,) * axes, 2).repeat(2, *[1] * (axes + 1))
    weight = (weight + 0.1 * torch.arange(4.0).view(-1, *[1] * (axes + 1))).requires_grad_()
    out = CONV[axes](x, weight, stride=2, padding=1)
    strided, wa = torch.full_like(channels_last(out), torch.nan), weight_composition.taps_first(weight.detach())
    naive.conv(strided, channels_last(x.detach()), wa, axes=axes, stride=2)
    assert_close_relative(strided, channels_last(out), FLOAT64)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    gx, gw = torch.autograd.grad(out, (x, weight), dy)
    phases = weight_composition.strided_gradient(weight_composition.flipped(wa), axes)
    found, dy = torch.empty_like(channels_last(gx)), channels_last(dy)
    none = wa.new_empty(3**axes, 0, 3)
    naive.conv(found, found[..., :0], none, axes=axes, stride=2, phased=True, b=dy, wb=phases)
    assert_close_relative(found, channels_last(gx), FLOAT64)
    phases = naive.conv_wgrad(dy, channels_last(x.detach()), axes=axes, phased=True)
    found = weight_composition.strided_weight_gradient(phases, axes)
    assert_close_relative(weight_composition.taps_last(found, axes), gw, FLOAT64)


@pytest.mark.parametrize("axes", [2, 3])
def test_weight_gradients_flow_back_through_the_composition(axes):
    low, prefix = maps(axes, 4, (2, 3, 2), 1), maps(axes, 3, (4, 6, 4), 0)
    weight = maps(axes, 8, (3,) * axes, 2).repeat(3, *[1] * (axes + 1)).requires_grad_()
    up = maps(axes, 5, (2,) * axes, 5).repeat(2, *[1] * (axes + 1)).requires_grad_()
    up_bias = maps(axes, 5, (1,) * axes, 4)[0].flatten().requires_grad_()
    out = CONV[axes](torch.cat([prefix, DECONV[axes](low, up, up_bias, stride=2)], 1), weight, padding=1)
    dy = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected = torch.autograd.grad(out, (weight, up, up_bias), dy)
    operands = weight_composition.first_operands(weight, None, 3, "phases", up, up_bias)
    dy = channels_last(dy)
    wa = naive.conv_wgrad(channels_last(prefix), dy, axes=axes)[0]
    wb = naive.conv_wgrad(channels_last(low), dy, axes=axes, phased=True)
    border = naive.border_sums(dy, axes)
    gradients = torch.autograd.grad([operands.wa, operands.wb, operands.border], (weight, up, up_bias), [wa, wb, border])
    assert_close_relative(gradients, expected, FLOAT64)


def test_folding_keeps_the_exact_eps():
    """Images divided by 255 twice leave variances near eps: then a wrong eps shows."""
    weight, bias = maps(2, 3, (3, 3), 0), torch.tensor([0.5, -1.0], dtype=torch.float64)
    norm = torch.nn.BatchNorm2d(2, eps=1e-3).double().eval()
    with torch.no_grad():
        norm.running_mean.copy_(torch.tensor([0.1, -0.2]))
        norm.running_var.copy_(torch.tensor([1e-3, 2e-5]))
        norm.weight.copy_(torch.tensor([0.7, -1.3]))
        norm.bias.copy_(torch.tensor([0.2, 0.3]))
    x = maps(2, 3, (5, 4), 1)
    statistics = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    for start in (bias, None):
        folded = F.conv2d(x, *weight_composition.fold(weight, start, statistics, norm.eps), padding=1)
        assert_close_relative(folded, norm(F.conv2d(x, weight, start, padding=1)), FLOAT64)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kernel", [None, 1, 2])
def test_no_constant_is_copied_to_the_device(axes, kernel):
    """A CUDA graph captures only kernels: no tensor is built from host values, and none is written element by element."""
    weight, up_bias = torch.ones(6, 8, *[3] * axes), torch.ones(5)
    up = None if kernel is None else torch.ones(4, 5, *[kernel] * axes)
    with Recorder() as recorder:
        operands = weight_composition.first_operands(weight, None, 3, "phases", up, None if up is None else up_bias)
        weight_composition.first_operands_backward(operands, weight, 3, "phases", up, None if up is None else up_bias)
        weight_composition.gathered(operands.wb, axes)
    assert not {"lift_fresh", "fill_", "index", "new_zeros", "_local_scalar_dense"} & set(recorder.operations)


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("kernel", [None, 1, 2])
def test_gradients_of_the_composition_are_those_of_autograd(axes, kernel):
    """`first_operands_backward` against autograd through `first_operands`, with no kernel between."""
    weight = maps(axes, 8, (3,) * axes, 2).repeat(3, *[1] * (axes + 1)).requires_grad_()
    up = up_bias = None
    if kernel:
        up = maps(axes, 5, (kernel,) * axes, 5).repeat(2, *[1] * (axes + 1)).requires_grad_()
        up_bias = maps(axes, 5, (1,) * axes, 4)[0].flatten().requires_grad_()
    operands = weight_composition.first_operands(weight, None, 3, "phases", up, up_bias)
    generator = torch.Generator().manual_seed(3)
    outputs = [part for part in (operands.wa, operands.wb, operands.border) if part is not None]
    g = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in outputs]
    inputs = [tensor for tensor in (weight, up, up_bias) if tensor is not None]
    expected = torch.autograd.grad(outputs, inputs, g)
    with torch.no_grad():
        gradients = weight_composition.first_operands_backward(
            weight_composition.Operands(g[0], g[1], None, g[2] if kernel else None), weight, 3, "phases", up, up_bias
        )
    assert_close_relative([gradient for gradient in gradients if gradient is not None], expected, FLOAT64)
