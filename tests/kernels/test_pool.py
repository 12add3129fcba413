"""Kernels of pool.py against the plain PyTorch of naive.py."""

import pytest
import torch
from support.kernel_cases import DTYPES, MAPS, Map, assert_kernel_close, doubled, random, random_affine, random_map

from unetpp_fast.kernels import maps, naive, pool

Size = tuple[int, int, int]
SMALL = maps.Tile(elements=64)
CASES = [  # axes and size, images, channels, rows of affine, slope
    (MAPS[0], 2, 5, None, 0.0),
    (MAPS[0], 2, 5, 1, 0.125),
    (MAPS[0], 3, 3, 3, 0.0),
    (MAPS[1], 1, 33, 1, 0.0),
    (MAPS[1], 2, 16, None, 0.0),
    (MAPS[2], 3, 1, 3, 0.125),
    (MAPS[2], 1, 3, None, 0.0),
    ((3, (2, 2, 2)), 3, 5, 1, 0.0),
    ((2, (1, 2, 2)), 1, 3, None, 0.0),
    (MAPS[0], 0, 3, 1, 0.0),
]


def half(case: tuple[int, Size], images: int, channels: int) -> tuple[int, ...]:
    """The shape of a pooled map."""
    axes, (depth, height, width) = case
    return images, depth // 2 if axes == 3 else depth, height // 2, width // 2, channels


def coarse(images: int, size: Size, channels: int, dtype: torch.dtype, seed: int) -> Map:
    """Few distinct values, exact in half precision: most windows have ties, and rounding adds none."""
    x = random_map(images, size, channels, dtype, seed=seed)
    x.view.copy_((x.view * 2).round() / 2)
    x.before.copy_(x.buffer)
    return x


def powers(rows: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An affine with powers of two, exact on coarse values."""
    scale, shift = random(rows, channels, seed=8), random(rows, channels, seed=9)
    return torch.where(scale > 0, 0.5, -2.0), (shift * 2).round()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("case", "images", "channels", "rows", "slope"), CASES)
def test_pool(case, images, channels, rows, slope, dtype):
    x = random_map(images, case[1], channels, dtype, seed=1)
    affine = random_affine(None if rows is None else min(rows, max(images, 1)), channels)
    results = []
    for function in (pool.pool, pool.pool, naive.pool):
        out = random_map(*reshaped(half(case, images, channels)), dtype, seed=2)
        options = {} if function is naive.pool else {"config": SMALL}
        function(out.view, x.view, axes=case[0], affine=affine, slope=slope, **options)
        out.assert_untouched(written=True)
        results.append(out.view)
    x.assert_untouched()
    exact = torch.empty(half(case, images, channels), dtype=torch.float64, device=x.view.device)
    naive.pool(exact, x.view.double(), axes=case[0], affine=doubled(affine), slope=slope)
    assert_kernel_close(results[0], exact, results[2])
    assert torch.equal(results[0], results[1])


def reshaped(shape: tuple[int, ...]) -> tuple[int, tuple[int, ...], int]:
    """Images, size and channels."""
    return shape[0], shape[1:4], shape[4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("case", "images", "channels", "rows", "slope"), CASES)
def test_pool_backward(case, images, channels, rows, slope, add, dtype):
    """Ties everywhere, and ReLU's zeros: the first pixel gets all of it, as in double precision."""
    x = coarse(images, case[1], channels, dtype, seed=1)
    g = random_map(*reshaped(half(case, images, channels)), dtype, seed=2)
    affine = None if rows is None else powers(rows, channels)
    options = {"axes": case[0], "affine": affine, "slope": slope, "add": add}
    results = []
    for function in (pool.pool_backward, pool.pool_backward, naive.pool_backward):
        gx = random_map(images, case[1], channels, dtype, seed=3)
        function(gx.view, g.view, x.view, **options, **({} if function is naive.pool_backward else {"config": SMALL}))
        gx.assert_untouched(written=True)
        results.append(gx.view)
    x.assert_untouched()
    g.assert_untouched()
    exact = random_map(images, case[1], channels, dtype, seed=3).view.double()
    naive.pool_backward(exact, g.view.double(), x.view.double(), **{**options, "affine": doubled(affine)})
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2]), "not the pixels that naive chose"
    assert torch.equal(results[0], exact.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_round_to_one_are_a_tie(dtype):
    """The window's maximum is over rounded values, and the first pixel that rounds to it gets the gradient."""
    x = random_map(1, (1, 4, 8), 5, dtype, seed=4)
    affine = random(1, 5, seed=5) * 1e-3, torch.ones(1, 5, device=x.view.device)
    g = random(1, 1, 2, 4, 5, seed=6, dtype=dtype)
    actual, expected = torch.full_like(x.view, torch.nan), torch.full_like(x.view, torch.nan)
    pool.pool_backward(actual, g, x.view, axes=2, affine=affine)
    naive.pool_backward(expected, g, x.view, axes=2, affine=affine)
    assert torch.equal(actual, expected)


def test_nan_is_kept():
    """Diverged training shows: a window with NaN pools to NaN, wherever in the window it is."""
    x = random(1, 1, 2, 8, 1)
    for k in range(4):
        x[0, 0, k // 2, 2 * k + k % 2] = torch.nan
    out = x.new_zeros(1, 1, 1, 4, 1)
    pool.pool(out, x, axes=2)
    assert out.isnan().all()
    actual, expected = torch.zeros_like(x), torch.zeros_like(x)
    pool.pool_backward(actual, torch.ones_like(out), x, axes=2)
    naive.pool_backward(expected, torch.ones_like(out), x, axes=2)
    assert torch.equal(actual, expected)


def test_errors():
    x = random(1, 1, 6, 5, 3)
    with pytest.raises(ValueError, match="not half"):
        pool.pool(random(1, 1, 3, 2, 3), x, axes=2)
    x = random(1, 2, 4, 4, 3)
    with pytest.raises(ValueError, match="not half"):
        pool.pool(random(1, 2, 2, 2, 3), x, axes=3)
    with pytest.raises(ValueError, match="gx"):
        pool.pool_backward(random(1, 2, 2, 2, 3), random(1, 1, 2, 2, 3), x, axes=3)
    with pytest.raises(ValueError, match=r"\[1 or 1, 3\]"):
        pool.pool(random(1, 1, 2, 2, 3), x, axes=3, affine=(random(2, 3), random(2, 3)))
    with pytest.raises(TypeError, match="float64"):
        pool.pool(random(1, 1, 2, 2, 3), x.double(), axes=3)
