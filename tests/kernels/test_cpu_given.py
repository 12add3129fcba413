"""What the CPU kernels do for networks over an encoder, against the plain PyTorch ops in float64: maps of which the first
channels are given, and a low source without a prefix."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support import cpu_kernels
from support.conv_cases import empty_holds_nan
from support.cpu_kernels import PAIRS, check_conv, check_wgrad, kernel_and_dtype

pytestmark = cpu_kernels.needs_library()


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """Memory that was never written holds NaN."""
    with empty_holds_nan():
        yield


@kernel_and_dtype()
@pytest.mark.parametrize("form", ["full", "node"])
@pytest.mark.parametrize("plain", [1, 8, 16, 19, 35])
def test_some_channels_are_read_as_they_are(dtype, kernel, plain, form):
    """Given maps before a node's own, of a width that ends within a vector, at its end, or that of the map."""
    for units in ((6, 10), (2, 3, 5)):
        check_conv(dtype, form, units, (35, 3, 17), plain=plain, affine="image shared")


@kernel_and_dtype()
@pytest.mark.parametrize("form", ["full", "node"])
@pytest.mark.parametrize("units", [(1, 1), (6, 10), (13, 7), (2, 6, 7)], ids=str)
def test_a_low_source_alone(dtype, kernel, form, units):
    """`a` has no channels."""
    check_conv(dtype, form, units, (0, 19, 33), affine="")
    check_conv(dtype, form, units, (0, 130, 65), n=3, affine="")


@kernel_and_dtype("winograd", "few", "tiles")
def test_pairs_of_a_low_source_alone(dtype, kernel):
    for low in PAIRS:
        cpu_kernels.check_pair(dtype, (18, 7), 17, low, channels=(0, 5, 7, 9))


@kernel_and_dtype("winograd", "tiles")
@pytest.mark.parametrize("plain", [1, 16, 19, 35])
def test_a_weight_gradient_of_channels_read_as_they_are(dtype, kernel, plain):
    for units in ((6, 10), (2, 3, 5)):
        check_wgrad(dtype, units, k=35, affine=0, slope=0.1, plain=plain)
