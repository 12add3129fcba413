"""Kernels of norm.py against the plain PyTorch of naive.py."""

import math
from collections.abc import Sequence

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative
from support.kernel_cases import DEVICE, DTYPES, MAPS, Map, assert_kernel_close, doubled, random, random_map
from torch import Tensor

from unetpp_fast.kernels import maps, naive, norm

SMALL = maps.Tile(elements=128, programs=6)  # several chunks of several tiles even where maps are small
CASES = [  # axes and size, images, channels, slope
    (MAPS[0], 3, 16, 0.0),
    (MAPS[1], 1, 33, 0.1),
    (MAPS[1], 3, 1, 0.0),
    (MAPS[2], 3, 3, 0.1),
    (MAPS[2], 1, 17, 0.0),
    ((2, (1, 1, 1)), 3, 3, 0.1),
    ((3, (1, 5, 1)), 1, 5, 0.0),
    (MAPS[0], 0, 3, 0.0),
]


def make_stats(images: int, parts: int, channels: int) -> Tensor:
    """Parts of unequal counts, one of them empty, with means far from zero."""
    stats = torch.stack([random(images, parts, channels, seed=k) for k in range(3)], dim=2)
    counts = torch.arange(parts, device=DEVICE, dtype=torch.float32) % 7 * 16
    stats[:, :, 0] = counts[None, :, None]
    stats[:, :, 1] += 100
    stats[:, :, 2] = stats[:, :, 2].square() * counts[None, :, None]
    return stats


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize(
    ("images", "parts", "channels"), [(1, 2, 1), (3, 9, 5), (2, 300, 17), (1, 1500, 3), (3, 700, 9), (0, 4, 3), (2, 0, 3)]
)
def test_finalise(images, parts, channels, instance):
    stats = make_stats(images, parts, channels)
    weight, bias = random(channels, seed=5), random(channels, seed=6)
    actual = norm_tables(norm, stats, weight, bias, 1e-5, instance)
    exact = norm_tables(naive, stats.double(), weight.double(), bias.double(), 1e-5, instance)
    again = norm_tables(norm, stats, weight, bias, 1e-5, instance)
    for a, e, b in zip(actual, exact, again, strict=True):
        assert a.dtype == torch.float32
        assert_close_relative(a.double(), e, FLOAT32)
        assert torch.equal(a, b)


def norm_tables(ops, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, instance: bool) -> list[Tensor]:
    """Mean, inverse deviation, scale and shift and, of the batch, mean and unbiased variance, written into slots of larger
    tensors, of which nothing else is written."""
    rows, channels = (stats.shape[0] if instance else 1), stats.shape[3]
    table = stats.new_full((4, rows, channels + 5), math.nan)
    moments = None if instance else stats.new_full((2, channels + 5), math.nan)
    slot = slice(2, 2 + channels)
    ops.norm_table(table[..., slot], stats, weight, bias, eps, instance, None if instance else moments[:, slot])
    results = [part.clone() for part in (*table[..., slot], *(() if instance else moments[:, slot]))]
    for whole in (table, *([] if instance else [moments])):
        whole[..., slot] = math.nan
        assert whole.isnan().all()
    return results


def test_finalise_does_not_cancel():
    """A mean of a thousand standard deviations: the difference of two sums of squares would have no correct digit."""
    x = (1000 + random(2, 64, 8, seed=1)).view(2, 8, 8, 8, 1).transpose(1, 4)
    stats = torch.cat([naive.statistics(x[:, :, k : k + 2]) for k in range(0, 8, 2)], dim=1)
    *_, variance = norm_tables(norm, stats, stats.new_ones(8), stats.new_zeros(8), 1e-5, False)
    assert_close_relative(variance.double(), x.double().var((0, 1, 2, 3), correction=1), FLOAT32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize(("case", "images", "channels", "slope"), CASES)
def test_norm_backward(case, images, channels, instance, frozen, slope, dtype):
    rows = images if instance else 1
    x = random_map(images, case[1], channels, dtype, seed=1)
    weight, bias = random(channels, seed=2), 0.3 * random(channels, seed=3)
    mean, inverse, *affine, _ = naive.norm_finalise(naive.statistics(x.view), weight, bias, 1e-1, instance)
    assert mean.shape[0] == rows
    results = []
    for function in (norm.norm_backward, norm.norm_backward, naive.norm_backward):
        g = random_map(images, case[1], channels, dtype, seed=4)
        options = {} if function is naive.norm_backward else {"config": SMALL}
        sums = function(g.view, x.view, mean, inverse, tuple(affine), slope, frozen, **options)
        g.assert_untouched(written=True)
        results.append((g.view, *sums))
    x.assert_untouched()
    exact = run_in_double(random_map(images, case[1], channels, dtype, seed=4), x, mean, inverse, affine, slope, frozen)
    for a, again, n, e in zip(*results, exact, strict=True):
        assert_kernel_close(a, e, n)
        assert torch.equal(a, again)


def run_in_double(
    g: Map, x: Map, mean: Tensor, inverse: Tensor, affine: Sequence[Tensor], slope: float, frozen: bool
) -> tuple[Tensor, Tensor, Tensor]:
    g, *others = doubled((g.view, x.view, mean, inverse, tuple(affine)))
    sums = naive.norm_backward(g, *others, slope, frozen)
    return g, *sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "images", "channels", "slope"), CASES)
def test_act_backward(case, images, channels, slope, dtype):
    out = random_map(images, case[1], channels, dtype, seed=1)
    out.view[out.view < 0.2] = 0  # zeros are not above zero
    out.before.copy_(out.buffer)
    results = []
    for function in (norm.act_backward, norm.act_backward, naive.act_backward):
        g = random_map(images, case[1], channels, dtype, seed=2)
        options = {} if function is naive.act_backward else {"config": SMALL}
        sums = function(g.view, out.view, slope, **options)
        g.assert_untouched(written=True)
        results.append((g.view, sums))
    out.assert_untouched()
    g = random_map(images, case[1], channels, dtype, seed=2).view.double()
    exact = g, naive.act_backward(g, out.view.double(), slope)
    for (a, again, n), e in zip(zip(*results, strict=True), exact, strict=True):
        assert torch.equal(a, again)
        assert_kernel_close(a, e if a.dim() == 5 else n.double(), n)  # the sums are of what was stored


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "images", "channels"),
    [*(case[:3] for case in CASES), ((2, (1, 3, 1)), 2, 3), ((3, (3, 4, 7)), 2, 5), ((3, (2, 1, 2)), 3, 1)],
)
def test_border_sums(case, images, channels, dtype):
    axes, size = case
    dy = random_map(images, size, channels, dtype, seed=1)
    actual = norm.border_sums(dy.view, axes, config=SMALL)
    dy.assert_untouched()
    if images == 0:
        assert torch.equal(actual, torch.zeros(3**axes, channels, device=DEVICE))
        return
    assert_kernel_close(actual, naive.border_sums(dy.view.double(), axes), naive.border_sums(dy.view, axes))
    assert torch.equal(actual, norm.border_sums(dy.view, axes, config=SMALL))


def test_border_sums_are_of_each_class_alone():
    """Values small compared with the neighbouring classes': a total minus the other classes would lose them."""
    dy = random(1, 1, 6, 40, 4)
    dy[:, :, 1:-1, 1:-1] *= 1e6
    actual, exact = norm.border_sums(dy, 2), naive.border_sums(dy.double(), 2)
    for row in (0, 1, 2, 3, 5, 6, 7, 8):
        assert_close_relative(actual[row].double(), exact[row], FLOAT32)


def test_cutting_covers_every_tile():
    tile = maps.Tile()
    for images, pixels, channels in [(1, 1, 1), (8, 512 * 512, 32), (1, 128**3, 24), (3, 1000, 513), (70000, 5, 2)]:
        chunks, steps = tile.chunks(images, pixels, channels)
        block_p, _ = tile.blocks(pixels, channels)
        assert chunks * steps * block_p >= pixels > (chunks - 1) * steps * block_p


def test_errors():
    x = random(2, 1, 4, 4, 3)
    with pytest.raises(TypeError, match="float64"):
        norm.act_backward(x.double(), x.double(), 0.0)
    with pytest.raises(ValueError, match="channels-last"):
        norm.act_backward(x.transpose(3, 4), x.transpose(3, 4), 0.0)
    with pytest.raises(ValueError, match="evenly spaced"):
        norm.act_backward(x[:, :, :, :3], x[:, :, :, :3], 0.0)
    with pytest.raises(ValueError, match="expected"):
        norm.act_backward(x, x[:1], 0.0)
    rows = random(3, 3)
    with pytest.raises(ValueError, match=r"\[1 or 2, 3\]"):
        norm.norm_backward(x, x.clone(), rows, rows, (rows, rows), 0.0, False)
    with pytest.raises(ValueError, match="statistics"):
        norm.norm_table(rows, x[0], rows[0], rows[0], 1e-5, True)
    with pytest.raises(ValueError, match="weight"):
        norm.norm_table(rows, random(1, 2, 3, 4), rows[0], rows[0], 1e-5, True)
    with pytest.raises(ValueError, match="side by side"):
        norm.norm_table(random(3, 1, 4).mT, random(1, 2, 3, 3), rows[0], rows[0], 1e-5, False)
