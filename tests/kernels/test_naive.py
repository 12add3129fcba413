"""The contract of the kernels, naive.py, against torch.nn.functional and its gradients in double precision."""

import itertools

import pytest
import torch
from support.helpers import FLOAT64, assert_close_relative
from torch import Tensor
from torch.nn import functional as F

from unetpp_fast.kernels import naive

SIZES = [(2, (1, 6, 8)), (3, (4, 2, 6))]
# What a phase p = 0 or 1 of conv3(up2(x)) takes of the three taps for each of its two low-resolution pixels.
NEAREST = {0: ((0,), (1, 2)), 1: ((0, 1), (2,))}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def first(x: Tensor, axes: int) -> Tensor:
    """Channels last, as in the engine, to channels first, as in PyTorch; without D in 2D."""
    x = x.movedim(-1, 1)
    return x if axes == 3 else x.squeeze(2)


def last(x: Tensor, axes: int) -> Tensor:
    return (x if axes == 3 else x.unsqueeze(2)).movedim(1, -1)


def convolution(x: Tensor, weight: Tensor, axes: int, **options) -> Tensor:
    return (F.conv3d if axes == 3 else F.conv2d)(x, weight, **options)


def taps_first(weight: Tensor) -> Tensor:
    """`[CO, K, *taps]` as `[taps^axes, K, CO]`."""
    return weight.flatten(2).permute(2, 1, 0)


def compose_nearest(weight: Tensor, axes: int) -> Tensor:
    """`[CO, K, *3]` as `[phases, 2^axes taps, K, CO]`: the sums of the taps that fall on one low-resolution pixel."""
    result = []
    for phase in itertools.product((0, 1), repeat=axes):
        for tap in itertools.product((0, 1), repeat=axes):
            groups = [NEAREST[p][t] for p, t in zip(phase, tap, strict=True)]
            result.append(sum(weight[(slice(None), slice(None), *taps)] for taps in itertools.product(*groups)).T)
    return torch.stack(result).unflatten(0, (2**axes, 2**axes))


def compose_deconv(weight: Tensor, up: Tensor, axes: int) -> Tensor:
    """The same after a transposed convolution `up` `[K, C, *2]`, whose element q is at position 2 u + q."""
    result = torch.zeros(2**axes, 2**axes, up.shape[0], weight.shape[0], dtype=weight.dtype)
    for k, phase in enumerate(itertools.product((0, 1), repeat=axes)):
        for taps in itertools.product(range(3), repeat=axes):
            positions = [p + t - 1 for p, t in zip(phase, taps, strict=True)]  # beside 2 u, at full resolution
            low = [position // 2 + 1 - p for position, p in zip(positions, phase, strict=True)]
            row = sum(t * 2 ** (axes - 1 - axis) for axis, t in enumerate(low))
            parity = [position % 2 for position in positions]
            result[k, row] += up[(..., *parity)] @ weight[(..., *taps)].T
    return result


def data_gradient_weights(composed: Tensor, axes: int) -> Tensor:
    """`[4^axes, CO, K]` for taps = 4, stride = 2: input position 2 u - 1 + q belongs to (p, t) with 2 - 2t - p = q - 1."""
    result = []
    for q in itertools.product(range(4), repeat=axes):
        pairs = [next((p, t) for p in (0, 1) for t in (0, 1) if 2 - 2 * t - p == offset - 1) for offset in q]
        index = [sum(pair[k] * 2 ** (axes - 1 - axis) for axis, pair in enumerate(pairs)) for k in (0, 1)]
        result.append(composed[index[0], index[1]].T)
    return torch.stack(result)


def network(axes: int, size: tuple[int, int, int], up: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A prefix, a low source, the weights of a conv3 over both, plain and composed, and its output by PyTorch."""
    a = random(2, *size, 3, seed=1).requires_grad_()
    b = random(2, *(s // 2 if s > 1 else 1 for s in size), 5, seed=2).requires_grad_()
    high = 5 if up == "nearest" else 4
    weight = random(6, 3 + high, *[3] * axes, seed=3).requires_grad_()
    deconv = random(5, 4, *[2] * axes, seed=4)
    if up == "nearest":
        low = F.interpolate(first(b, axes), scale_factor=2, mode="nearest")
        composed = compose_nearest(weight[:, 3:], axes)
    else:
        low = (F.conv_transpose3d if axes == 3 else F.conv_transpose2d)(first(b, axes), deconv, stride=2)
        composed = compose_deconv(weight[:, 3:], deconv, axes)
    y = last(convolution(torch.cat([first(a, axes), low], 1), weight, axes, padding=1), axes)
    return a, b, weight, composed, y


@pytest.mark.parametrize("up", ["nearest", "deconv"])
@pytest.mark.parametrize(("axes", "size"), SIZES)
def test_conv_over_prefix_and_low_source(axes, size, up):
    a, b, weight, composed, expected = network(axes, size, up)
    out = torch.full((2, *size, 6), torch.nan, dtype=torch.float64)
    wa = taps_first(weight[:, :3])
    stats = naive.conv(
        out, a.detach(), wa.detach(), axes=axes, stride=2, phased=True, b=b.detach(), wb=composed.detach(), stats=True
    )
    assert_close_relative(out, expected, FLOAT64)
    mean, *_, variance = naive.norm_finalise(stats, torch.ones(6), torch.zeros(6), 1e-5, False)
    assert_close_relative(mean[0], expected.mean((0, 1, 2, 3)), FLOAT64)
    assert_close_relative(variance[0], expected.var((0, 1, 2, 3), correction=0), FLOAT64)


@pytest.mark.parametrize("up", ["nearest", "deconv"])
@pytest.mark.parametrize(("axes", "size"), SIZES)
def test_gradients_of_conv_over_prefix_and_low_source(axes, size, up):
    a, b, weight, composed, y = network(axes, size, up)
    dy = random(*y.shape, seed=9)
    composed_again = composed.detach().requires_grad_()
    ga, gb, gw = torch.autograd.grad(y, (a, b, weight), dy, retain_graph=True)

    # The prefix: the same convolution with flipped taps, added to what is there.
    flipped = taps_first(weight.detach()[:, :3]).flip(0).transpose(1, 2)
    out = random(*a.shape, seed=5)
    before = out.clone()
    assert naive.conv(out, dy, flipped, axes=axes, add=True) is None
    assert_close_relative(out - before, ga, FLOAT64)

    # The low source: four taps per axis at stride 2.
    out = torch.full_like(b, torch.nan).detach()
    naive.conv(out, dy, data_gradient_weights(composed_again.detach(), axes), axes=axes, taps=4, stride=2)
    assert_close_relative(out, gb, FLOAT64)

    # The weights: the result of conv_wgrad goes through PyTorch's gradient of the composition.
    wa = naive.conv_wgrad(a.detach(), dy, axes=axes)
    assert_close_relative(wa[0], taps_first(gw[:, :3]), FLOAT64)
    wb = naive.conv_wgrad(b.detach(), dy, axes=axes, phased=True)
    (through,) = torch.autograd.grad(composed, weight, wb)
    assert_close_relative(through[:, 3:], gw[:, 3:], FLOAT64)


@pytest.mark.parametrize(("axes", "size"), [*SIZES, (2, (1, 1, 5)), (3, (1, 3, 1))])
def test_conv_with_second_operand_and_epilogue(axes, size):
    """Two operands of the size of out, norm on load with zero padding after it, bias, activation."""
    a, b = random(2, *size, 3, seed=1), random(2, *size, 4, seed=2)
    weight, bias = random(5, 7, *[3] * axes, seed=3), random(5, seed=4)
    affine_a = random(2, 3, seed=5), random(2, 3, seed=6)
    affine_b = random(1, 4, seed=7), random(1, 4, seed=8)
    read = [
        F.leaky_relu(first(x, axes) * s[(..., *[None] * axes)] + t[(..., *[None] * axes)], 0.1)
        for x, (s, t) in ((a, affine_a), (b, affine_b))
    ]
    expected = F.leaky_relu(convolution(torch.cat(read, 1), weight, axes, bias=bias, padding=1), 0.1)
    out = torch.full((2, *size, 5), torch.nan, dtype=torch.float64)
    naive.conv(
        out, a, taps_first(weight[:, :3]), axes=axes, affine_a=affine_a, b=b, wb=taps_first(weight[:, 3:])[None],
        affine_b=affine_b, slope=0.1, bias=bias, act=True,
    )  # fmt: skip
    assert_close_relative(out, last(expected, axes), FLOAT64)


@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize(("axes", "size"), SIZES)
def test_border_table_and_its_gradient(axes, size, phased):
    """The table added pixel by pixel through an index, whose gradient sums by class."""
    table = random(3**axes, 2, seed=1).requires_grad_()
    a, wa = torch.zeros(1, *size, 3, dtype=torch.float64), torch.zeros(3**axes, 3, 2, dtype=torch.float64)
    out = torch.zeros(1, *size, 2, dtype=torch.float64)
    naive.conv(out, a, wa, axes=axes, stride=2 if phased else 1, phased=phased, border=table.detach())
    rows = naive.border_classes(size, axes, out.device)
    assert torch.equal(out[0], table[rows])
    corner = [(0, 0), (size[1] - 1, 6), (1, 3)] if axes == 2 else [(0, 0), (size[1] - 1, 6)]
    for y, row in corner:
        assert rows[0, y, 0] == row
    dy = random(2, *size, 2, seed=2)
    (expected,) = torch.autograd.grad(table[rows].expand_as(dy), table, dy)
    assert_close_relative(naive.border_sums(dy, axes), expected, FLOAT64)


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["batch", "instance", "frozen"])
@pytest.mark.parametrize(("axes", "size"), SIZES)
def test_norm_and_activation(axes, size, kind, slope):
    x, weight, bias = (v.requires_grad_() for v in (random(3, *size, 4, seed=1), random(4, seed=2), random(4, seed=3)))
    running = random(4, seed=4), random(4, seed=5).square()
    if kind == "instance":
        y = F.instance_norm(first(x, axes), weight=weight, bias=bias, eps=1e-3)
    else:
        mean, variance = running if kind == "frozen" else (None, None)
        y = F.batch_norm(first(x, axes), mean, variance, weight, bias, training=kind == "batch", eps=1e-3)
    y = last(F.leaky_relu(y, slope), axes)
    g = random(*x.shape, seed=6)
    expected = torch.autograd.grad(y, (x, weight, bias), g)

    x, weight, bias = x.detach(), weight.detach(), bias.detach()
    if kind == "frozen":
        mean, inverse = running[0][None], (running[1] + 1e-3).rsqrt()[None]
        affine = weight * inverse, bias - mean * weight * inverse
    else:
        halves = [naive.statistics(part) for part in (x[:, :, :, :2], x[:, :, :, 2:])]
        mean, inverse, *affine, _ = naive.norm_finalise(torch.cat(halves, 1), weight, bias, 1e-3, kind == "instance")
    assert_close_relative(naive.read(x, tuple(affine), slope), y, FLOAT64)
    sums = naive.norm_backward(g, x, mean, inverse, tuple(affine), slope, kind == "frozen")
    assert_close_relative((g, *sums), expected, FLOAT64)


@pytest.mark.parametrize("slope", [0.0, 0.1])
def test_act_backward(slope):
    x = random(2, 1, 3, 4, 5, seed=1).requires_grad_()
    out, g = F.leaky_relu(x, slope), random(2, 1, 3, 4, 5, seed=2)
    (expected,) = torch.autograd.grad(out, x, g)
    sums = naive.act_backward(g, out.detach(), slope)
    assert_close_relative((g, sums), (expected, expected.sum((0, 1, 2, 3))), FLOAT64)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("axes", "size"), SIZES)
def test_pool(axes, size, add):
    """With ties: both pass the gradient to the first."""
    raw = (random(2, *size, 3, seed=1) * 2).round()
    affine = torch.tensor([[0.5, -2.0, 1.0]], dtype=torch.float64), torch.tensor([[0.0, 1.0, -1.0]], dtype=torch.float64)
    x = naive.read(raw, affine, 0.0).requires_grad_()
    y = last((F.max_pool3d if axes == 3 else F.max_pool2d)(first(x, axes), 2), axes)
    out = torch.full(y.shape, torch.nan, dtype=torch.float64)
    naive.pool(out, raw, axes=axes, affine=affine)
    assert torch.equal(out, y)
    g, gx = random(*y.shape, seed=2), random(*x.shape, seed=3)
    (expected,) = torch.autograd.grad(y, x, g)
    expected = gx + expected if add else expected
    naive.pool_backward(gx, g, raw, axes=axes, affine=affine, add=add)
    assert torch.equal(gx, expected)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("axes", "size"), SIZES)
def test_head(axes, size, add):
    raw, affine = random(2, *size, 3, seed=1), (random(2, 3, seed=5), random(2, 3, seed=6))
    x = naive.read(raw, affine, 0.1).requires_grad_()
    weight, bias = random(4, 3, seed=2).requires_grad_(), random(4, seed=3).requires_grad_()
    y = convolution(first(x, axes), weight[(..., *[None] * axes)], axes, bias=bias)
    y = y if axes == 3 else y.unsqueeze(2)
    out = torch.full(y.shape, torch.nan, dtype=torch.float64)
    naive.head(out, raw, weight.detach(), bias.detach(), affine=affine, slope=0.1)
    assert_close_relative(out, y, FLOAT64)
    dy, gx = random(*y.shape, seed=7), random(*x.shape, seed=8)
    expected = torch.autograd.grad(y, (x, weight, bias), dy)
    expected = (gx + expected[0] if add else expected[0], *expected[1:])
    sums = naive.head_backward(gx, dy, raw, weight.detach(), affine=affine, slope=0.1, add=add)
    assert_close_relative((gx, *sums), expected, FLOAT64)


def test_relu_of_minus_infinity_is_zero():
    values = torch.tensor([-torch.inf, -1.0, 2.0, torch.nan])
    assert naive.activate(values, 0.0).tolist()[:3] == [0.0, 0.0, 2.0] and naive.activate(values, 0.0)[3].isnan()
    assert naive.activate(values, 0.5).tolist()[:3] == [-torch.inf, -0.5, 2.0] and naive.activate(values, 0.5)[3].isnan()
