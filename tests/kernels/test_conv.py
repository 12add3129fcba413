"""The convolution kernel in Triton's interpreter (or on a GPU, where there is one) against its twin in plain PyTorch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.conv_cases import DTYPES, Inputs, assert_judged, check_conv, conv_case
from support.kernel_cases import DEVICE
from torch import Tensor

from unetpp_fast.kernels import conv as kernels
from unetpp_fast.kernels import conv_configs, conv_wgrad, naive


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes, size", [(2, (6, 10)), (3, (2, 4, 6))])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"kb": 3, "affine": "image shared", "slope": 0.1, "act": True, "stats": True},
        {"taps": 4, "add": True},
        {"strided": True, "affine": "image", "bias": True, "stats": True},
        {"phased": True, "affine": "shared", "bias": True},
        {"phased": True, "kb": 3, "affine": "shared image", "slope": 0.1, "border": True, "act": True, "stats": True},
    ],
    ids=["plain", "full-resolution", "low-gradient", "strided", "phases", "node"],
)
def test_uses(dtype: torch.dtype, axes: int, size: tuple[int, ...], form: dict):
    """Every use of the kernel in every precision."""
    check_conv(kernels.conv, dtype, axes, size, n=1 if axes == 3 else 2, **form)


@pytest.mark.parametrize(
    "option",
    [
        {"act": True},
        {"act": True, "slope": 0.1, "bias": True},
        {"affine": "shared", "add": True},
        {"affine": "image", "slope": 0.1, "stats": True},
        {"border": True, "stats": True, "add": True},
        {"bias": True, "border": True, "act": True, "stats": True},
    ],
    ids=lambda option: "-".join(option),
)
def test_options(option: dict):
    for dtype in (torch.float32, torch.float16):
        check_conv(kernels.conv, dtype, 2, (5, 7), n=3, **option)


@pytest.mark.parametrize(
    "ka, kb, co",
    [(1, 3, 1), (3, 33, 5), (33, 1, 17), (5, 17, 33), (16, 32, 32), (16, 3, 17), (33, 16, 5), (5, 17, 16)],
)
def test_channels(ka: int, kb: int, co: int):
    """Odd and unequal widths, below and between the blocks of channels; and those that fill blocks, which are not masked."""
    check_conv(kernels.conv, torch.float32, 2, (4, 6), ka=ka, kb=kb, co=co, phased=True, affine="shared image", stats=True)


@pytest.mark.parametrize("ka, kb, taps", [(1, 0, 3), (2, 4, 3), (4, 1, 3), (3, 0, 4)])
@pytest.mark.parametrize("axes, size", [(2, (6, 10)), (3, (2, 4, 6))])
def test_few_channels(axes: int, size: tuple[int, ...], ka: int, kb: int, taps: int, monkeypatch: pytest.MonkeyPatch):
    """A product's rows go over taps: one of them, or more; offsets of 64 bits too."""
    phased = kb > 1
    form = {"affine": "image shared", "slope": 0.1, "plain": ka // 2, "stats": True} if taps == 3 else {"add": True}
    check_conv(kernels.conv, torch.float32, axes, size, n=2, ka=ka, kb=kb, taps=taps, phased=phased, **form)
    if ka == 1:
        monkeypatch.setattr(kernels, "NARROW_OFFSETS", 0)
        check_conv(kernels.conv, torch.float16, axes, size, n=1, ka=ka, taps=taps)


@pytest.mark.parametrize("plain", [1, 16, 19, 20])
def test_some_channels_are_read_as_they_are(plain: int):
    for dtype in (torch.float32, torch.float16):
        check_conv(kernels.conv, dtype, 2, (4, 6), ka=20, kb=3, phased=True, affine="image shared", slope=0.1, plain=plain)


@pytest.mark.parametrize("axes, size", [(2, (4, 6)), (3, (2, 4, 2))])
@pytest.mark.parametrize("phased", [False, True])
def test_a_low_source_alone(axes: int, size: tuple[int, ...], phased: bool):
    """`a` has no channels."""
    check_conv(kernels.conv, torch.float32, axes, size, ka=0, kb=5, phased=phased, bias=True, act=True, stats=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("phased", [False, True])
def test_one_pixel_axes(size: tuple[int, int], phased: bool):
    size = tuple(2 * s for s in size) if phased else size
    check_conv(kernels.conv, torch.float32, 2, size, phased=phased, kb=3, border=True, stats=True, affine="shared shared")


@pytest.mark.parametrize("size, taps, phased", [((1, 1, 3), 3, False), ((1, 2, 1), 4, False), ((2, 2, 2), 3, True)])
def test_one_pixel_axes_3d(size: tuple[int, int, int], taps: int, phased: bool):
    check_conv(kernels.conv, torch.float32, 3, size, n=1, taps=taps, phased=phased, border=True, stats=True, affine="shared")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(n: int):
    check_conv(kernels.conv, torch.float32, 2, (2, 4), n=n, phased=True, kb=3, affine="image image", stats=True)


@pytest.mark.parametrize("wide", [False, True])
def test_many_tiles(wide: bool, monkeypatch: pytest.MonkeyPatch):
    """Tiles smaller than the map and hanging over its end; several blocks of channels; offsets of 64 bits."""
    if wide:
        monkeypatch.setattr(kernels, "NARROW_OFFSETS", 0)
    config = conv_configs.Config(1, 2, 8, 16, 16, 4, 1)
    check_conv(
        partial(kernels.conv, config=config), torch.float32, 2, (3, 10), n=2, ka=17, co=17, affine="image", stats=True
    )
    run = partial(kernels.conv, config=conv_configs.Config(2, 2, 4, 16, 32, 4, 1))
    check_conv(run, torch.float32, 3, (4, 2, 10), n=1, taps=4, border=True, stats=True)


def test_reads_a_buffer_that_it_writes():
    """A node reads the prefix of its level's buffer and writes the next slice of it."""
    make = Inputs(torch.float32)
    buffer = make.values(2, 1, 4, 6, 12)
    expected, wa = buffer.clone(), make.values(9, 8, 4)
    kernels.conv(buffer[..., 8:], buffer[..., :8], wa, axes=2)
    naive.conv(expected[..., 8:], expected[..., :8].clone(), wa, axes=2)
    assert_judged(buffer, expected.double(), expected, torch.float32)


def test_padding_after_norm_and_nan_in_place():
    """Zero padding is not shifted; a NaN of the map itself comes out, at ReLU too."""
    out, a, wa, options = conv_case(torch.float32, 2, (3, 3), affine="shared", act=True)
    a[0, 0, 1, 1, 0] = math.nan
    kernels.conv(out, a, wa, **options)
    assert out[0].isnan().all() and not out[1].isnan().any()


def test_relu_of_minus_infinity_is_zero():
    """Where an operand is read and where a result is stored."""
    results = []
    for negative in (-math.inf, -60000.0):
        out, a, wa, options = conv_case(torch.float32, 2, (3, 3), affine="shared", act=True, bias=True)
        options["affine_a"][0].abs_()
        a[0, 0, 1, 1, 0] = options["bias"][0] = negative
        kernels.conv(out, a, wa, **options)
        results.append(out)
    assert not results[0][..., 0].any() and torch.equal(*results)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"axes": 4}, "axes is 2 or 3"),
        ({"taps": 5}, "taps is"),
        ({"a": lambda a: a[:1]}, "a is"),
        ({"a": lambda a: a.half()}, "float16"),
        ({"a": lambda a: a.expand(2, 1, 4, 6, 5).permute(0, 1, 3, 2, 4)}, "a is"),
        ({"a": lambda a: a.transpose(3, 4).contiguous().transpose(3, 4)}, "channels-last"),
        ({"a": lambda a: a.new_zeros(2, 1, 8, 6, 5)[:, :, ::2]}, "evenly spaced"),
        ({"wa": lambda wa: wa[:4]}, "wa is"),
        ({"wa": lambda wa: wa.double()}, "wa is"),
        ({"bias": torch.zeros(3)}, "bias is"),
        ({"affine_a": (torch.zeros(3, 5), torch.zeros(3, 5))}, "affine_a is"),
        ({"b": torch.zeros(2, 1, 4, 6, 3)}, "b and wb"),
        ({"phased": True, "stride": 1, "axes": 3}, "even"),
    ],
)
def test_says_what_is_wrong(change: dict, message: str):
    out, a, wa, options = conv_case(torch.float32, 2, (4, 6))
    for name, value in change.items():
        if callable(value):
            a, wa = (value(a), wa) if name == "a" else (a, value(wa))
        else:
            options[name] = tuple(v.to(DEVICE) for v in value) if isinstance(value, tuple) else value
            options[name] = value.to(DEVICE) if isinstance(value, Tensor) else options[name]
    with pytest.raises(ValueError, match=message):
        kernels.conv(out, a, wa, **options)


@pytest.mark.parametrize("units", [(64, 64, 64), (1, 512, 512), (3, 5, 2)])
def test_tiles_in_the_interpreter_are_no_larger_than_triton_allows(units):
    axes = 2 if units[0] == 1 else 3
    for k, co in ((1, 1), (16, 32), (40, 5), (512, 96)):
        config = conv_configs.default_config(units, 1, k, co, axes, False, torch.float32, True)
        assert config.pixels * max(conv_configs.block_of_channels(k, config.block_k), config.block_co) <= 2**20
        config = conv_wgrad.default_config(units, k, co, axes, False, torch.float32, True)
        assert config.pixels * max(config.block_m, config.block_co) <= 2**20
        assert config.block_m * config.block_co <= 2**20


def test_configurations():
    """Blocks are powers of two that cover the map and its channels; the first is the default."""
    for units, co, axes in [((1, 512, 512), 32, 2), ((1, 6, 6), 512, 2), ((24, 24, 24), 96, 3), ((1, 3, 100), 5, 2)]:
        configs = conv_configs.configs(units, 2, co, axes, True, torch.float16)
        assert configs[0] == conv_configs.default_config(units, 2, 16, co, axes, True, torch.float16, False)
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert config.pixels in (64, 128, 256) and config.block_co in (16, 32, 64, 128)
            assert axes == 3 or config.block_d == 1


def test_large_tiles_come_first_where_they_fit_and_fill_the_gpu():
    """And one stage of plain loads, which L1 serves, for narrow maps."""

    def first(co: int, size: int, shared: int, images: int = 16) -> tuple[int, int, int]:
        config = conv_configs.configs((1, size, size), images, co, 2, False, torch.bfloat16, shared)[0]
        return config.pixels, config.block_k, config.num_stages

    large, small = 227 * 1024, conv_configs.LEAST_SHARED
    assert first(128, 128, large) == (256, 64, 3) and first(128, 128, small) == (128, 32, 3)
    assert first(512, 16, large, 1) == first(512, 16, small, 1) == (64, 64, 3)
    assert first(32, 512, large) == first(64, 256, small) == (128, 32, 1)
