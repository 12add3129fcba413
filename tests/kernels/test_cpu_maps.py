"""The CPU kernels of pooling, heads, norms and activations against the plain PyTorch ops in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import cpu_kernels
from support.conv_cases import empty_holds_nan
from support.cpu_kernels import DTYPES, SIZES, CpuInputs, assert_accepted, check_map, map_case, run_op

from unetpp_fast.kernels import cpu_ops, naive

pytestmark = cpu_kernels.needs_library()
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
CASES = [  # size, images, channels, rows of the affine, slope
    ((6, 10), 2, 5, "", 0.0),
    ((6, 10), 3, 31, "image", 0.1),
    ((2, 74), 1, 33, "shared", 0.0),
    ((14, 26), 2, 7, "shared", 0.1),
    ((2, 2), 3, 64, "image", 0.0),
    ((4, 2, 6), 2, 3, "image", 0.1),
    ((2, 26, 2), 1, 16, "shared", 0.0),
    ((6, 10), 0, 5, "shared", 0.0),
    ((74, 2), 2, 1, "", 0.0),
    ((2, 6), 2, 32, "image", 0.0),
]
WIDTHS = (1, 3, 7, 16, 31, 32, 33, 64, 5, 1, 17, 3)
ODD = [(size, 2, channels, "", 0.1) for size, channels in zip(SIZES[2] + SIZES[3], WIDTHS, strict=True)]
OPS = ("pool", "pool_backward", "head", "head_backward", "norm_backward", "act_backward")


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """Memory that was never written holds NaN."""
    with empty_holds_nan():
        yield


@pytest.fixture(autouse=True, params=[4096, 50])
def chunk(request, monkeypatch) -> None:
    """Pixels of a partial sum: all of a small map, or few."""
    monkeypatch.setattr(cpu_ops, "CHUNK", request.param)


@each_dtype
@pytest.mark.parametrize("size, n, channels, rows, slope", CASES)
def test_pool(size, n, channels, rows, slope, dtype):
    check_map("pool", dtype, size, n, channels, rows, slope)


@each_dtype
@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("size, n, channels, rows, slope", CASES)
def test_pool_backward(size, n, channels, rows, slope, add, dtype):
    """With ties in most windows, of ReLU's zeros too: the first pixel gets all of the gradient."""
    (gx, g, x), options = map_case("pool_backward", dtype, size, n, channels, rows, slope, add)
    if rows:  # whose results are exact
        scale, shift = options["affine"]
        scale.copy_(torch.where(scale > 0, 0.5, -2.0))
        shift.copy_((2 * shift).round())
    cpu_kernels.check_op("pool_backward", (gx, g, x), {**options, "slope": 0.125 if slope else 0.0})


def test_a_window_with_nan_pools_to_nan():
    x = torch.randn(1, 1, 2, 10, 3)
    for k in range(4):
        x[0, 0, k // 2, 2 * k + k % 2] = math.nan
    x[0, 0, :, 8:] = math.nan
    out = torch.zeros(1, 1, 1, 5, 3)
    cpu_ops.pool(out, x, axes=2)
    assert out.isnan().all()
    actual, expected = torch.zeros_like(x), torch.zeros_like(x)
    cpu_ops.pool_backward(actual, torch.ones_like(out), x, axes=2)
    naive.pool_backward(expected, torch.ones_like(out), x, axes=2)
    assert torch.equal(actual, expected)


def test_minus_infinity_is_read_as_zero_with_a_slope_of_zero():
    x = torch.full((1, 1, 2, 4, 5), -math.inf)
    affine = torch.ones(1, 5), torch.zeros(1, 5)
    out, scores, weight = torch.ones(1, 1, 1, 2, 5), torch.ones(1, 2, 1, 2, 4), torch.ones(2, 5)
    cpu_ops.pool(out, x, axes=2, affine=affine)
    assert (out == 0).all()
    cpu_ops.head(scores, x, weight, torch.full((2,), 3.0), affine=affine)
    assert (scores == 3).all()
    gradient, _ = cpu_ops.head_backward(torch.empty_like(x), scores, x, weight, affine=affine)
    assert (gradient == 0).all()


@each_dtype
@pytest.mark.parametrize("classes", [1, 3, 21])
@pytest.mark.parametrize("size, n, channels, rows, slope", [*CASES[:6], CASES[7], *ODD[::2]])
def test_head(size, n, channels, rows, slope, classes, dtype):
    check_map("head", dtype, size, n, channels, rows, slope, classes=classes)


@each_dtype
@pytest.mark.parametrize("add, classes", [(False, 1), (True, 3), (False, 21)])
@pytest.mark.parametrize("size, n, channels, rows, slope", [*CASES[:6], CASES[7], *ODD[1::2]])
def test_head_backward(size, n, channels, rows, slope, add, classes, dtype):
    check_map("head_backward", dtype, size, n, channels, rows, slope, add, classes)


def test_scores_in_another_layout():
    """What a loss gives may be expanded or transposed; it is not written."""
    make = CpuInputs(torch.float32)
    x, weight = make.map(2, 1, 4, 6, 5), make.values(3, 5)
    for dy in (make.values(2, 3, 1, 6, 4).transpose(3, 4), torch.ones(1, 1, 1, 1, 1).expand(2, 3, 1, 4, 6)):
        gx, exact = torch.empty(x.shape), torch.empty(x.shape, dtype=torch.float64)
        before = dy.clone()
        results = gx, *cpu_ops.head_backward(gx, dy, x, weight)
        expected = exact, *naive.head_backward(exact, dy.double(), x.double(), weight.double())
        for a, e in zip(results, expected, strict=True):
            assert_accepted(a, e, a)
        assert torch.equal(dy, before)


@each_dtype
@pytest.mark.parametrize("mode", ["batch", "instance", "frozen", "averages"])
@pytest.mark.parametrize("size, n, channels, rows, slope", [*CASES[::3], *ODD])
def test_norm_backward(size, n, channels, rows, slope, mode, dtype):
    check_map("norm_backward", dtype, size, n, channels, slope=slope, mode=mode)


def test_averages_get_the_sums_and_the_pixels():
    args, options = map_case("norm_backward", torch.float32, (6, 10), 3, 7, mode="averages")
    seen = []
    options = {"averages": lambda sums, count: seen.append((sums, count)) or sums / count}
    of_weight, of_bias = cpu_ops.norm_backward(*args, **options)
    (sums, count), *others = seen
    assert count == 3 * 60 and not others and sums.dtype == torch.float32
    assert torch.equal(sums, torch.stack((of_bias, of_weight)))


@each_dtype
@pytest.mark.parametrize("size, n, channels, rows, slope", [*CASES, *ODD])
def test_act_backward(size, n, channels, rows, slope, dtype):
    check_map("act_backward", dtype, size, n, channels, slope=slope)


def test_nan_passes_activations_and_norms():
    """The gradient of a diverged training is not hidden."""
    for name, index in (("act_backward", 0), ("norm_backward", 0), ("norm_backward", 1)):
        args, options = map_case(name, torch.float32, (6, 10), mode="frozen", slope=0.1)
        args[index][0, 0, 2, 3, 1] = math.nan
        expected = run_op(naive, name, [args[0].clone(), *args[1:]], options, True)
        results = run_op(cpu_ops, name, args, options, True)
        for a, e in zip(results, expected, strict=True):
            assert torch.equal(a.isnan(), e.isnan())
        assert results[1].isnan().any()


@pytest.mark.parametrize("size, n, channels, rows, slope", [CASES[0], CASES[5], *ODD])
def test_border_sums(size, n, channels, rows, slope):
    check_map("border_sums", torch.float32, size, n, channels)


def test_norm_table():
    stats = torch.rand(3, 4, 3, 7) + 1
    weight, bias = torch.randn(7), torch.randn(7)
    for instance in (False, True):
        table, moments = torch.empty(4, 3 if instance else 1, 7), None if instance else torch.empty(2, 7)
        cpu_ops.norm_table(table, stats, weight, bias, 1e-5, instance, moments)
        exact = naive.norm_finalise(stats.double(), weight.double(), bias.double(), 1e-5, instance)
        for a, e in zip(table, exact[:4], strict=True):
            assert_accepted(a, e, a)
        if not instance:
            count = stats.double()[:, :, 0].sum((0, 1))
            assert_accepted(moments[0], exact[0, 0], moments[0])
            assert_accepted(moments[1], exact[4, 0] * count / (count - 1), moments[1])


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=str)
def test_maps_without_pixels(name, size):
    args, options = map_case(name, torch.float32, size)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in args]
    expected = run_op(naive, name, before, options, True)
    found = run_op(cpu_ops, name, args, options, True)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def calls() -> list[Callable[[], list[torch.Tensor]]]:
    """Every op on several chunks and rows; each call starts from the same values."""
    made = []
    for name in OPS:
        for size in ((26, 74), (6, 4, 14)):
            (first, *rest), options = map_case(name, torch.float32, size, channels=33, slope=0.1)
            start = first.clone()
            made.append(
                lambda name=name, start=start, rest=rest, options=options: run_op(
                    cpu_ops, name, [start.clone(), *rest], options, True
                )
            )
    return made


def test_bits_are_those_of_any_number_of_threads_and_of_calls_at_once(threads):
    expected = [call() for call in calls()]
    runs = []
    for count in (2, 3):
        threads(count)
        runs.append([call() for call in calls()])
    threads(1)
    with ThreadPoolExecutor(4) as pool:
        runs += pool.map(lambda k: [call() for call in calls()], range(4))
    for results in runs:
        for a, b in zip(expected, results, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
