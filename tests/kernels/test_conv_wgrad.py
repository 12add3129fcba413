"""The kernel of weight gradients in Triton's interpreter (or on a GPU) against its twin in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_conv import DEVICE, DTYPES, Inputs, assert_judged, bits, double
from torch import Tensor

from unetpp_fast.kernels import conv_wgrad as kernels
from unetpp_fast.kernels import naive


def make_case(
    dtype: torch.dtype, axes: int, size: tuple[int, ...], n: int = 2, k: int = 5, co: int = 17,
    phased: bool = False, affine: int | None = None, slope: float = 0.0,
) -> tuple[Tensor, Tensor, dict]:  # fmt: skip
    """a, dy and the options of a call; `size` is that of dy, `affine` its number of rows (0: one for each image)."""
    make = Inputs(dtype)
    size = (1, *size) if axes == 2 else size
    units = tuple(s // 2 if phased and on else s for s, on in zip(size, (axes == 3, True, True), strict=True))
    options = {"axes": axes, "phased": phased, "slope": slope}
    if affine is not None:
        options["affine"] = make.affine(affine or n, k)
    return make.map(n, *units, k, before=0), make.map(n, *size, co), options


def check(dtype: torch.dtype, *args, run: Callable = kernels.conv_wgrad, **kwargs) -> None:
    """One call of `run` against the twin; the inputs keep their bits, and a second call gives the same ones."""
    a, dy, options = make_case(dtype, *args, **kwargs)
    before = bits(a), bits(dy)
    exact = naive.conv_wgrad(double(a), double(dy), **{name: double(value) for name, value in options.items()})
    twin = naive.conv_wgrad(a, dy, **options)
    found = run(a, dy, **options)
    assert found.dtype == twin.dtype
    assert_judged(found, exact, twin, dtype)
    assert torch.equal(bits(a), before[0]) and torch.equal(bits(dy), before[1]), "an input was written"
    assert torch.equal(found, run(a, dy, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes, size", [(2, (6, 10)), (3, (2, 4, 6))])
@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("affine, slope", [(None, 0.0), (1, 0.0), (0, 0.1)])
def test_uses(dtype: torch.dtype, axes: int, size: tuple[int, ...], phased: bool, affine: int | None, slope: float):
    check(dtype, axes, size, phased=phased, affine=affine, slope=slope)


@pytest.mark.parametrize("k, co", [(1, 3), (3, 1), (17, 33), (33, 5)])
@pytest.mark.parametrize("phased", [False, True])
def test_channels(k: int, co: int, phased: bool):
    """Odd and unequal widths, whose taps begin anywhere in a block of rows."""
    check(torch.float32, 2, (4, 6), k=k, co=co, phased=phased, affine=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("phased", [False, True])
def test_one_pixel_axes(size: tuple[int, int], phased: bool):
    check(torch.float32, 2, tuple(2 * s for s in size) if phased else size, phased=phased, affine=0)


@pytest.mark.parametrize("size, phased", [((1, 1, 3), False), ((1, 2, 1), False), ((2, 2, 2), True)])
def test_one_pixel_axes_3d(size: tuple[int, int, int], phased: bool):
    check(torch.float32, 3, size, phased=phased, affine=1)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(n: int):
    """Three images by one split more than there are: the last one has tiles past the end."""
    config = kernels.WgradConfig(1, 2, 8, 64, 32, 4, 1, programs=3)
    check(torch.float32, 2, (4, 6), n=n, affine=0, run=partial(kernels.conv_wgrad, config=config))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("programs", [1, 2, 8])
def test_splits(programs: int, wide: bool, monkeypatch: pytest.MonkeyPatch):
    """Tiles that hang over the map's end, carried from row to row, plane to plane and image to image."""
    if wide:
        monkeypatch.setattr(kernels, "NARROW_OFFSETS", 0)
    config = kernels.WgradConfig(1, 2, 8, 64, 32, 4, 1, programs=programs)
    check(torch.float32, 2, (3, 10), n=2, k=3, run=partial(kernels.conv_wgrad, config=config))
    config = kernels.WgradConfig(2, 2, 4, 128, 32, 4, 1, programs=programs)
    check(torch.float32, 3, (3, 2, 5), n=1, k=3, co=4, run=partial(kernels.conv_wgrad, config=config))


def test_nan_of_the_map_reaches_its_taps_alone():
    """A corner's value meets no gradient through the taps that would look past the border."""
    a, dy, options = make_case(torch.float32, 2, (4, 4))
    a[0, 0, 0, 0, 0] = math.nan
    found, twin = kernels.conv_wgrad(a, dy, **options), naive.conv_wgrad(a, dy, **options)
    assert torch.equal(found.isnan(), twin.isnan()) and twin.isnan().any()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes": 1}, "axes is 2 or 3"),
        ({"a": lambda a: a[:, :, :2]}, "a is"),
        ({"a": lambda a: a.half()}, "float16"),
        ({"a": lambda a: a[..., :0]}, "no channels"),
        ({"affine": (torch.zeros(1, 5), torch.zeros(1, 4))}, "affine is"),
        ({"affine": (torch.zeros(1, 5), torch.zeros(2, 5))}, "differ"),
    ],
)
def test_says_what_is_wrong(change: dict, message: str):
    a, dy, options = make_case(torch.float32, 2, (4, 6))
    for name, value in change.items():
        if name == "a":
            a = value(a)
        else:
            options[name] = tuple(v.to(DEVICE) for v in value) if isinstance(value, tuple) else value
    with pytest.raises(ValueError, match=message):
        kernels.conv_wgrad(a, dy, **options)


def test_configurations():
    cases = [((1, 512, 512), 32, 32, 2), ((1, 6, 6), 512, 512, 2), ((24, 24, 24), 96, 64, 3), ((1, 9, 9), 1, 5, 2)]
    for units, k, co, axes in cases:
        found = kernels.configs(units, k, co, axes, False, torch.float16)
        assert found[0] == kernels.default_config(units, k, co, axes, False, torch.float16, False)
        assert len(set(found)) == len(found)
        for config in found:
            assert config.block_m in (16, 32, 64, 128) and config.block_co in (16, 32, 64, 128)
            assert axes == 3 or config.block_d == 1
