"""The kernel of weight gradients in Triton's interpreter (or on a GPU) against its twin in plain PyTorch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.conv_cases import DTYPES, check_wgrad, wgrad_case
from support.kernel_cases import DEVICE

from unetpp_fast.kernels import conv_wgrad as kernels
from unetpp_fast.kernels import naive


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes, size", [(2, (6, 10)), (3, (2, 4, 6))])
@pytest.mark.parametrize("phased", [False, True])
@pytest.mark.parametrize("affine, slope", [(None, 0.0), (1, 0.0), (0, 0.1)])
def test_uses(dtype: torch.dtype, axes: int, size: tuple[int, ...], phased: bool, affine: int | None, slope: float):
    check_wgrad(kernels.conv_wgrad, dtype, axes, size, phased=phased, affine=affine, slope=slope)


@pytest.mark.parametrize("k, co", [(1, 3), (3, 1), (17, 33), (33, 5), (16, 32), (32, 17), (5, 16)])
@pytest.mark.parametrize("phased", [False, True])
def test_channels(k: int, co: int, phased: bool):
    """Odd and unequal widths, whose taps begin anywhere in a block of rows; and those that fill blocks."""
    check_wgrad(kernels.conv_wgrad, torch.float32, 2, (4, 6), k=k, co=co, phased=phased, affine=1)


@pytest.mark.parametrize("plain", [1, 16, 20])
@pytest.mark.parametrize("affine", [1, 0])
def test_some_channels_are_read_as_they_are(affine: int, plain: int):
    check_wgrad(kernels.conv_wgrad, torch.float32, 2, (4, 6), k=20, affine=affine, slope=0.1, plain=plain)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("phased", [False, True])
def test_one_pixel_axes(size: tuple[int, int], phased: bool):
    size = tuple(2 * s for s in size) if phased else size
    check_wgrad(kernels.conv_wgrad, torch.float32, 2, size, phased=phased, affine=0)


@pytest.mark.parametrize("size, phased", [((1, 1, 3), False), ((1, 2, 1), False), ((2, 2, 2), True)])
def test_one_pixel_axes_3d(size: tuple[int, int, int], phased: bool):
    check_wgrad(kernels.conv_wgrad, torch.float32, 3, size, phased=phased, affine=1)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(n: int):
    """Nine tiles of three images by two programs: the last one has a tile past the end."""
    config = kernels.WgradConfig(1, 2, 8, 64, 32, 4, 1, programs=2)
    check_wgrad(partial(kernels.conv_wgrad, config=config), torch.float32, 2, (6, 6), n=n, affine=0)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("programs", [1, 3, 8])
def test_splits(programs: int, wide: bool, monkeypatch: pytest.MonkeyPatch):
    """Tiles that hang over the map's end, carried from row to row, plane to plane and image to image."""
    if wide:
        monkeypatch.setattr(kernels, "NARROW_OFFSETS", 0)
    config = kernels.WgradConfig(1, 2, 8, 64, 32, 4, 1, programs=programs)
    check_wgrad(partial(kernels.conv_wgrad, config=config), torch.float32, 2, (3, 10), n=2, k=3)
    config = kernels.WgradConfig(2, 2, 4, 128, 32, 4, 1, programs=programs)
    check_wgrad(partial(kernels.conv_wgrad, config=config), torch.float32, 3, (3, 2, 5), n=1, k=3, co=4)


def test_nan_of_the_map_reaches_only_its_taps():
    """A corner's value meets no gradient through the taps that would look past the border."""
    a, dy, options = wgrad_case(torch.float32, 2, (4, 4))
    a[0, 0, 0, 0, 0] = math.nan
    gradient, twin = kernels.conv_wgrad(a, dy, **options), naive.conv_wgrad(a, dy, **options)
    assert torch.equal(gradient.isnan(), twin.isnan()) and twin.isnan().any()


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
    a, dy, options = wgrad_case(torch.float32, 2, (4, 6))
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
        configs = kernels.configs(units, k, co, axes, False, torch.float16)
        assert configs[0] == kernels.default_config(units, k, co, axes, False, torch.float16, False)
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert config.block_m in (16, 32, 64, 128) and config.block_co in (16, 32, 64, 128)
            assert axes == 3 or config.block_d == 1


def test_splits_fill_whole_waves():
    """Of programs that a GPU runs at once; tiles are shared out evenly, and sums are written for some gain only."""
    for tiles, programs, at_once in ((65536, 3, 396), (16384, 9, 264), (512, 144, 264), (100, 1, 264), (1, 5, 264)):
        steps = kernels.steps_of(tiles, programs, at_once, 64)
        splits = -(-tiles // steps)
        waves = programs * splits / at_once
        assert (splits - 1) * steps < tiles and waves <= kernels.MOST_WAVES
        if programs * tiles > 20 * at_once:
            assert waves / -(-programs * splits // at_once) > 0.8, (tiles, programs)
    assert kernels.steps_of(100, 1, 264, 64) < kernels.steps_of(100, 1, 2, 64) == 50
