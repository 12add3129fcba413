"""The CPU kernels of weight gradients against the plain PyTorch ops in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from support import cpu_kernels
from support.conv_cases import empty_holds_nan
from support.cpu_kernels import CHANNELS, SIZES, check_wgrad, dtypes_of, kernel_and_dtype, wgrad_of

from unetpp_fast.kernels import cpu_ops

pytestmark = cpu_kernels.needs_library()


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """Memory that was never written holds NaN."""
    with empty_holds_nan():
        yield


each_wgrad = pytest.mark.parametrize("kernel", ["winograd", "tiles"], indirect=True)


@kernel_and_dtype("winograd", "tiles")
@pytest.mark.parametrize("units", [(6, 10), (13, 7), (2, 6, 7)], ids=str)
@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("affine, slope", [(None, 0.0), (1, 0.0), (0, 0.1)])
def test_weight_gradients(kernel, dtype, units, phased, affine, slope):
    check_wgrad(dtype, units, phased, affine=affine, slope=slope)


@each_wgrad
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
@pytest.mark.parametrize("phased", [False, True])
def test_channels_of_weight_gradients(kernel, channels, phased):
    check_wgrad(dtypes_of(kernel)[0], (5, 9), phased, k=channels[0], co=channels[2], affine=1)
    check_wgrad(dtypes_of(kernel)[0], (2, 1, 7), phased, k=channels[1], co=channels[0])


@kernel_and_dtype("winograd", "tiles")
@pytest.mark.parametrize("phased", [False, True])
def test_many_channels_of_weight_gradients(kernel, dtype, phased):
    """More sums than stay in the cache, taken in parts of which the last is smaller."""
    check_wgrad(dtype, (5, 9), phased, k=200, co=130, affine=1)


@kernel_and_dtype("tiles")
@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("units, n", [((40, 210), 2), ((3, 5000), 1), ((3, 4), 700), ((3, 40, 60), 1)], ids=str)
def test_strips_of_weight_gradients(kernel, dtype, phased, units, n):
    """Planes of several strips of rows, one row a strip, and more strips than are summed at once."""
    check_wgrad(dtype, units, phased, k=3, co=5, n=n, affine=0)


@each_wgrad
@pytest.mark.parametrize("units", SIZES[2] + SIZES[3], ids=str)
@pytest.mark.parametrize("phased", [False, True])
def test_sizes_of_weight_gradients(kernel, units, phased, monkeypatch):
    """Tiles in one batch, and in batches of few that end within a plane."""
    check_wgrad(dtypes_of(kernel)[0], units, phased, affine=0)
    if kernel == "tiles":
        return
    monkeypatch.setattr(cpu_ops, "SCRATCH", 36 * 2 * 32 * 5)
    monkeypatch.setattr(cpu_ops, "MIN_BATCH", 1)
    check_wgrad(torch.float32, units, phased, affine=0)


@each_wgrad
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("phased", [False, True])
def test_batches_of_weight_gradients(kernel, n, phased):
    check_wgrad(dtypes_of(kernel)[0], (4, 6), phased, n=n, affine=0)


@each_wgrad
def test_minus_infinity_has_no_weight_gradient_where_it_activates_to_zero(kernel):
    (a, dy), options = wgrad_of(dtypes_of(kernel)[0], (6, 9), affine=1)
    options["affine"][0].abs_()
    a[0, 0, 2, 3] = -1e30
    expected = cpu_ops.conv_wgrad(a, dy, **options)
    a[0, 0, 2, 3] = -math.inf
    assert torch.equal(cpu_ops.conv_wgrad(a, dy, **options), expected)
