"""Kernels of head.py against the plain PyTorch of naive.py."""

from collections.abc import Sequence

import pytest
import torch
from support.kernel_cases import DEVICE, DTYPES, MAPS, assert_kernel_close, doubled, random, random_affine, random_map

from unetpp_fast.kernels import head, maps, naive

CASES = [  # axes and size, images, channels, classes, rows of affine, slope
    (MAPS[0], 3, 5, 1, None, 0.0),
    (MAPS[0], 2, 33, 3, 1, 0.1),
    (MAPS[0], 3, 3, 9, 3, 0.0),
    (MAPS[1], 1, 16, 8, None, 0.0),
    (MAPS[1], 2, 70, 21, 2, 0.1),
    (MAPS[2], 1, 1, 1, 1, 0.0),
    (MAPS[2], 3, 5, 12, None, 0.0),
    ((2, (1, 1, 1)), 3, 3, 2, 3, 0.1),
    ((3, (1, 5, 1)), 1, 600, 3, 1, 0.0),
    ((2, (1, 3, 7)), 1, 17, 64, 1, 0.1),
    (MAPS[1], 1, 32, 16, 1, 0.1),
    (MAPS[0], 0, 3, 2, 1, 0.0),
]
PRECISIONS = [(dtype, torch.float32) for dtype in DTYPES] + [(dtype, dtype) for dtype in DTYPES[1:]]
SMALL = maps.Tile(elements=256, programs=6)


def make_scores(
    images: int, classes: int, size: Sequence[int], dtype: torch.dtype, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Contiguous scores in the middle of a buffer, with four NaN on either side, and the buffer."""
    values = random(images, classes, *size, seed=seed, dtype=dtype)
    buffer = torch.full((values.numel() + 8,), torch.nan, dtype=dtype, device=DEVICE)
    scores = buffer[4 : 4 + values.numel()].view(values.shape)
    scores.copy_(values)
    return scores, buffer


@pytest.mark.parametrize(("dtype", "weight_dtype"), PRECISIONS)
@pytest.mark.parametrize(("case", "images", "channels", "classes", "rows", "slope"), CASES)
def test_head(case, images, channels, classes, rows, slope, dtype, weight_dtype):
    x = random_map(images, case[1], channels, dtype, seed=1)
    affine = random_affine(rows, channels)
    weight = random(classes, channels, seed=2, dtype=weight_dtype)
    bias = random(classes, seed=3)
    results = []
    for function in (head.head, head.head, naive.head):
        out, buffer = make_scores(images, classes, case[1], dtype, seed=4)
        options = {} if function is naive.head else {"config": SMALL}
        function(out, x.view, weight, bias, affine=affine, slope=slope, **options)
        assert buffer[:4].isnan().all() and buffer[-4:].isnan().all()
        results.append(out)
    x.assert_untouched()
    exact = results[2].double()
    naive.head(exact, *doubled((x.view, weight, bias)), affine=doubled(affine), slope=slope)
    assert_kernel_close(results[0], exact, results[2])
    assert torch.equal(results[0], results[1])


@pytest.mark.parametrize(("dtype", "weight_dtype"), PRECISIONS)
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("case", "images", "channels", "classes", "rows", "slope"), CASES)
def test_head_backward(case, images, channels, classes, rows, slope, add, dtype, weight_dtype):
    x = random_map(images, case[1], channels, dtype, seed=1)
    affine = random_affine(rows, channels)
    weight = random(classes, channels, seed=2, dtype=weight_dtype)
    dy, _ = make_scores(images, classes, case[1], dtype, seed=4)
    options = {"slope": slope, "add": add}
    results = []
    for function in (head.head_backward, head.head_backward, naive.head_backward):
        gx = random_map(images, case[1], channels, dtype, seed=3)
        config = {} if function is naive.head_backward else {"config": SMALL}
        sums = function(gx.view, dy, x.view, weight, affine=affine, **options, **config)
        gx.assert_untouched(written=True)
        results.append((gx.view, *sums))
    x.assert_untouched()
    gx = random_map(images, case[1], channels, dtype, seed=3).view.double()
    exact = gx, *naive.head_backward(gx, *doubled((dy, x.view, weight)), affine=doubled(affine), **options)
    for a, again, n, e in zip(*results, exact, strict=True):
        assert_kernel_close(a, e, n)
        assert torch.equal(a, again)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_scores_in_another_layout_and_precision(dtype):
    """What a loss gives may be float32 for half maps, and expanded or transposed; it is not written."""
    x = random(2, 1, 4, 6, 5, seed=1, dtype=dtype)
    weight = random(3, 5, seed=2)
    dy = random(2, 3, 1, 6, 4, seed=3).transpose(3, 4)
    before = dy.clone()
    gx, expected = torch.empty_like(x), torch.empty_like(x)
    sums = head.head_backward(gx, dy, x, weight)
    naive_sums = naive.head_backward(expected, dy, x, weight)
    exact = torch.empty(x.shape, dtype=torch.float64, device=DEVICE)
    exact_sums = naive.head_backward(exact, dy.double(), x.double(), weight.double())
    assert torch.equal(dy, before)
    for a, n, e in zip((gx, *sums), (expected, *naive_sums), (exact, *exact_sums), strict=True):
        assert_kernel_close(a, e, n)
    ones = torch.ones(1, 1, 1, 1, 1, device=DEVICE).expand(dy.shape)
    _, bias = head.head_backward(gx, ones, x, weight)
    assert torch.equal(bias, torch.full_like(bias, 48))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_are_not_rounded_to_half(dtype):
    """Sums in which all but the part of the weights that half precision loses cancels."""
    signs = torch.tensor([1.0, -1.0], device=DEVICE).repeat(5)
    weight = (signs[:, None] + 3e-4 * torch.ones(10, 32, device=DEVICE)).contiguous()
    x = torch.ones(1, 1, 2, 3, 32, dtype=dtype, device=DEVICE)
    out = torch.empty(1, 10, 1, 2, 3, dtype=dtype, device=DEVICE)
    head.head(out, x, weight, -32 * signs)
    assert torch.allclose(out.float(), torch.full_like(out.float(), 32 * 3e-4), rtol=1e-2)
    gx = torch.empty_like(x)
    head.head_backward(gx, torch.ones_like(out), x, weight)
    assert torch.allclose(gx.float(), torch.full_like(gx.float(), 10 * 3e-4), rtol=1e-2)


def test_errors():
    x, weight, bias = random(2, 1, 4, 4, 3), random(2, 3), random(2)
    out = random(2, 2, 1, 4, 4)
    with pytest.raises(ValueError, match="expected out"):
        head.head(out[:1], x, weight, bias)
    with pytest.raises(ValueError, match="contiguous"):
        head.head(out.transpose(3, 4), x, weight, bias)
    with pytest.raises(ValueError, match="bias"):
        head.head(out, x, weight, bias[:1])
    with pytest.raises(ValueError, match="65 classes"):
        head.head(random(2, 65, 1, 4, 4), x, random(65, 3), random(65))
    with pytest.raises(TypeError, match="float16"):
        head.head(out, x, weight.half(), bias)
    with pytest.raises(ValueError, match="gx"):
        head.head_backward(x[:1], out, x, weight)
