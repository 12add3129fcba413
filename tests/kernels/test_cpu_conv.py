"""The CPU kernels of convolutions against the plain PyTorch ops in float64."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from support import cpu_kernels
from support.conv_cases import check_statistics, empty_holds_nan
from support.cpu_kernels import (
    CHANNELS,
    DTYPES,
    FORMS,
    KERNELS,
    PAIRS,
    SIZES,
    check_conv,
    conv_of,
    dtypes_of,
    kernel_and_dtype,
    wgrad_of,
)  # fmt: skip
from torch import Tensor

from unetpp_fast.kernels import cpu_ops, cpu_weights, naive

pytestmark = cpu_kernels.needs_library()
each_kernel = pytest.mark.parametrize("kernel", list(KERNELS), indirect=True)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def unwritten() -> Iterator[None]:
    """Memory that was never written holds NaN."""
    with empty_holds_nan():
        yield


@kernel_and_dtype()
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("units", [(6, 10), (13, 7), (2, 6, 7)], ids=str)
def test_forms(dtype, kernel, form, units):
    check_conv(dtype, form, units)


@each_kernel
@pytest.mark.parametrize("channels", CHANNELS, ids=str)
def test_channels(kernel, channels):
    for form, units in (("full", (5, 9)), ("node", (5, 9)), ("edges", (5, 9)), ("gathered", (3, 7)), ("node", (1, 3, 5))):
        check_conv(dtypes_of(kernel)[0], form, units, channels)


@each_kernel
@pytest.mark.parametrize("units", SIZES[2] + SIZES[3], ids=str)
def test_sizes(kernel, units):
    """Maps one pixel wide, smaller than a tile, and larger than a block."""
    for form in ("full", "node", "edges", "corners", "gathered"):
        check_conv(dtypes_of(kernel)[0], form, units, n=1, border=True)


@kernel_and_dtype()
@pytest.mark.parametrize(
    "option",
    [
        {"act": True},
        {"act": True, "slope": 0.1, "bias": True},
        {"affine": "shared shared", "add": True},
        {"affine": "image image", "slope": 0.1, "stats": True},
        {"border": True, "stats": True, "add": True},
        {"bias": True, "border": True, "act": True, "stats": True},
        {"act": "relu6", "bias": True, "add": True},
        {"act": "hardswish", "border": True, "stats": True},
        {"act": "silu", "affine": "shared shared"},
    ],
    ids=lambda option: "-".join(option),
)
def test_options(dtype, kernel, option):
    cleared = dict.fromkeys(("act", "bias", "border", "stats", "add"), False)
    for form in ("full", "node"):
        check_conv(dtype, form, (5, 7), n=3, **{**cleared, "affine": "", "slope": 0.0, **option})


@each_kernel
@pytest.mark.parametrize("n", [0, 1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_batches(kernel, n, form):
    check_conv(dtypes_of(kernel)[0], form, (3, 5), n=n)


@each_kernel
@pytest.mark.parametrize("size", [(0, 4), (4, 0)], ids=str)
def test_maps_without_pixels(kernel, size):
    dtype = dtypes_of(kernel)[0]
    out, a = torch.empty(2, 1, *size, 3, dtype=dtype), torch.empty(2, 1, *size, 5, dtype=dtype)
    cpu_ops.conv(out, a, torch.ones(9, 5, 3), axes=2)
    assert torch.equal(cpu_ops.conv_wgrad(a, out, axes=2), torch.zeros(1, 9, 5, 3))


@pytest.mark.parametrize("tiles, images, channels, kernel", [
    (5, 1, 5, "direct"), (6, 1, 5, "winograd"), (5, 2, 5, "direct"), (5, 2, 500, "few"), (5, 1, 500, "direct"),
    (3, 400, 500, "direct"), (7, 200, 500, "winograd"),
])  # fmt: skip
def test_the_kernel_follows_the_tiles(tiles, images, channels, kernel):
    """All give the same values, so the rule may change with measurements."""
    out = torch.empty(images, 1, 4, 4 * tiles, 17)
    assert cpu_ops.kernel_for(out, channels, 2, 3, 1, False, False) == kernel
    with_tiles = "tiles" if cpu_ops.matrix_tiles() == "cpu" else kernel
    assert cpu_ops.kernel_for(out.bfloat16(), channels, 2, 3, 1, False, False) == with_tiles


@pytest.mark.parametrize("side, channels, kernel", [
    (16, 64, "direct"), (32, 32, "direct"), (32, 64, "winograd"), (64, 8, "direct"), (64, 16, "winograd"),
    (16, 512, "few"),
])  # fmt: skip
@pytest.mark.parametrize("images", [1, 2])
def test_narrow_bare_sums_of_small_maps_are_direct(side, channels, kernel, images):
    out = torch.empty(images, 1, side, side, 32)
    assert cpu_ops.kernel_for(out, channels, 2, 3, 1, False, False, bare=True) == kernel
    usual = "few" if kernel == "few" else "winograd"
    assert cpu_ops.kernel_for(out, channels, 2, 3, 1, False, False) == usual
    assert cpu_ops.kernel_for(out.bfloat16(), channels, 2, 3, 1, False, False, bare=True) in (usual, "tiles")


@each_dtype
@pytest.mark.parametrize("form", FORMS)
def test_weights_transformed_as_they_are_read(dtype, form, monkeypatch):
    """The same bits as with packed weights: more channels than a panel, and tiles of several images in one product."""
    args, options = conv_of(dtype, form, (14, 9), (70, 130, 40), n=5)
    results = []
    for kernel in ("winograd", "few"):
        cpu_kernels.select(kernel, monkeypatch.setattr)
        results.append(cpu_kernels.run_op(cpu_ops, "conv", [args[0].clone(), *args[1:]], options, True))
    for packed, few in zip(*results, strict=True):
        assert torch.equal(cpu_kernels.bits(packed), cpu_kernels.bits(few))


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_any_strides(form, monkeypatch):
    """As they lie in a parameter, in one that is flipped and transposed, and within a larger tensor."""
    layouts = (
        lambda w: w.transpose(-1, -2).contiguous().transpose(-1, -2),
        lambda w: w.movedim(-3, -1).contiguous().movedim(-1, -3),
        lambda w: torch.cat((w, w), -1)[..., : w.shape[-1]],
    )
    for kernel in cpu_kernels.kernels_here():
        cpu_kernels.select(kernel, monkeypatch.setattr)
        args, options = conv_of(dtypes_of(kernel)[0], form, (9, 13), (7, 19, 33))
        expected = cpu_kernels.run_op(cpu_ops, "conv", [args[0].clone(), *args[1:]], options, True)
        for layout in layouts:
            changed = options if options.get("wb") is None else {**options, "wb": layout(options["wb"])}
            out, a, wa = args
            results = cpu_kernels.run_op(cpu_ops, "conv", [out.clone(), a, layout(wa)], changed, True)
            assert all(torch.equal(x, y) for x, y in zip(expected, results, strict=True))


@each_dtype
@pytest.mark.parametrize("option", [
    {}, {"affine": ""}, {"affine": "", "act": False, "add": True}, {"affine": "shared", "plain": 3, "act": "relu6"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("units", SIZES[2] + SIZES[3], ids=str)
def test_one_tap(units, option, dtype):
    for channels in CHANNELS:
        plain = min(option.get("plain", 0), channels[0])
        check_conv(dtype, "point", units, channels, **{**option, "plain": plain})


def test_one_tap_of_many_pixels_and_channels():
    for units, channels in (((61, 67), (5, 0, 33)), ((9, 43), (700, 0, 40)), ((2, 3), (1300, 0, 130))):
        check_conv(torch.float32, "point", units, channels, affine="")


@pytest.mark.parametrize("options", [{"b": 1}, {"border": 9}, {"stats": True}, {"stride": 2}], ids=str)
def test_what_one_tap_does_not_know_is_named(options):
    out, a, given = torch.ones(1, 1, 4, 6, 3), torch.ones(1, 1, 4, 6, 5), dict(options)
    if "b" in given:
        given |= {"b": a, "wb": torch.ones(1, 9, 5, 3)}
    if "border" in given:
        given["border"] = torch.ones(9, 3)
    with pytest.raises(RuntimeError, match=r"taps|stats"):
        cpu_ops.conv(out, a, torch.ones(1, 5, 3), axes=2, taps=1, **given)


@pytest.mark.parametrize("act", naive.FURTHER_ACTIVATIONS)
def test_activations_of_any_value(act):
    """Far from zero and near it; NaN passes."""
    x = torch.cat((torch.linspace(-120, 120, 2001), torch.linspace(-1e-3, 1e-3, 200), torch.tensor([0, math.nan, math.inf])))
    a = x.view(1, 1, 1, -1, 1)
    out = torch.empty(1, 1, 1, len(x), 17)
    cpu_ops.conv(out, a, torch.ones(1, 1, 17), axes=2, taps=1, act=act)
    exact = naive.FURTHER_ACTIVATIONS[act](a.double()).expand(out.shape)
    torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6, equal_nan=True)


@each_kernel
def test_reads_a_buffer_that_it_writes(kernel):
    """A node reads the prefix of its level's buffer and writes the next slice of it."""
    make = cpu_kernels.CpuInputs(dtypes_of(kernel)[0])
    buffer, wa = make.values(2, 1, 9, 13, 24), make.values(9, 8, 16)
    exact = buffer.double()
    naive.conv(exact[..., 8:], exact[..., :8].clone(), wa.double(), axes=2)
    cpu_ops.conv(buffer[..., 8:], buffer[..., :8], wa, axes=2)
    cpu_kernels.assert_accepted(buffer, exact, buffer)


@each_dtype
def test_large_results(dtype):
    """Results of 16 MB go past the caches where a vector is aligned and whole: here some are, some are not."""
    make = cpu_kernels.CpuInputs(dtype)
    a, wa = make.map(1, 1, 512, 512, 2), make.values(9, 2, 40)
    buffer = torch.full((1, 1, 512, 512, 56), math.nan, dtype=dtype)
    twin = torch.empty(1, 1, 512, 512, 40, dtype=dtype)
    exact = twin.double()
    naive.conv(exact, a.double(), wa.double(), axes=2)
    naive.conv(twin, a, wa, axes=2)
    cpu_ops.conv(buffer[..., 16:], a, wa, axes=2)
    cpu_kernels.assert_accepted(buffer[..., 16:], exact, twin)
    assert buffer[..., :16].isnan().all()


@each_kernel
def test_statistics_do_not_cancel(kernel):
    """A mean of a thousand standard deviations: the difference of two sums of squares would keep no digit."""
    (out, a, wa), options = conv_of(dtypes_of(kernel)[0], "plain", (13, 21), affine="")
    parts = cpu_ops.conv(out, a, wa, **{**options, "act": False, "bias": torch.full_like(options["bias"], 1000)})
    check_statistics(parts, out)
    table = naive.norm_finalise(parts, parts.new_ones(17), parts.new_zeros(17), 0.0, True)
    exact = out.double().var((1, 2, 3), correction=0)
    assert ((table[4] - exact).abs() <= 1e-5 * exact).all()


@each_kernel
def test_minus_infinity_activates_to_zero(kernel):
    """With a slope of 0, in what is read and in what is stored, as ReLU does."""
    (out, a, wa), options = conv_of(dtypes_of(kernel)[0], "plain", (6, 9), affine="shared", stats=False)
    options["affine_a"][0].abs_()
    a[0, 0, 2, 3] = -1e30
    cpu_ops.conv(out, a, wa, **options)
    expected = out.clone()
    a[0, 0, 2, 3] = -math.inf
    options["bias"][4] = -math.inf
    cpu_ops.conv(out, a, wa, **options)
    assert (out[..., 4] == 0).all()
    expected[..., 4] = 0
    assert torch.equal(out, expected)


@each_kernel
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays(kernel, form):
    """Wherever the plain op has NaN, and no farther than the tiles that hold the pixel."""
    (out, a, wa), options = conv_of(dtypes_of(kernel)[0], form, (10, 13))
    a[0, 0, 2, 3, 0] = math.nan
    expected = out.clone()
    naive.conv(expected, a, wa, **options)
    cpu_ops.conv(out, a, wa, **options)
    assert expected.isnan().any() and (out.isnan() | ~expected.isnan()).all()
    assert not out[1:].isnan().any() and not out[:, :, 16:].isnan().any() and not out[:, :, :, 16:].isnan().any()
    if kernel == "direct":
        assert torch.equal(out.isnan(), expected.isnan())


@each_kernel
def test_weights_are_packed_again_when_they_change(kernel):
    (out, a, wa), options = conv_of(dtypes_of(kernel)[0], "plain", (5, 9), affine="", bias=False, stats=False)
    cpu_ops.conv(out, a, wa, **options)
    once = out.clone()
    wa.mul_(2)
    cpu_ops.conv(out, a, wa, **options)
    assert torch.equal(out, 2 * once)
    with torch.inference_mode():
        weight = wa / 2  # tensors made here do not count their changes
        cpu_ops.conv(out, a, weight, **options)
        assert torch.equal(out, once)
        weight.mul_(2)
        cpu_ops.conv(out, a, weight, **options)
        assert torch.equal(out, 2 * once)


@pytest.mark.parametrize("kernel", ["winograd", "direct"], indirect=True)
def test_packed_weights_go_with_the_weights(kernel):
    (out, a, wa), options = conv_of(torch.float32, "node", (5, 9))
    before = len(cpu_weights._kept)
    cpu_ops.conv(out, a, wa, **options)
    assert len(cpu_weights._kept) > before
    del wa, options["wb"]
    assert len(cpu_weights._kept) == before


@kernel_and_dtype("winograd", "few", "tiles")
@pytest.mark.parametrize("low", PAIRS)
@pytest.mark.parametrize("size, held", [((18, 7), 17), ((18, 7), 25), ((3, 40), 33), ((37, 3), 49), ((16, 8), 17)], ids=str)
def test_pairs_run_strip_by_strip(dtype, kernel, low, size, held):
    """Strips of 8, 16 and more rows, of which the last has fewer; and one that holds the whole map."""
    cpu_kernels.check_pair(dtype, size, held, low)


@kernel_and_dtype("tiles")
@pytest.mark.parametrize("channels", [(32, 64, 32), (40, 33, 70)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_tiles(kernel, dtype, form, channels):
    """Maps of several blocks in each direction, and blocks of several images together."""
    check_conv(dtype, form, (3, 150), channels, n=1)
    check_conv(dtype, form, (47, 130), channels, n=1)
    check_conv(dtype, form, (5, 4), channels, n=20)


@pytest.mark.parametrize("n, size", [(0, (18, 7)), (2, (0, 7))], ids=str)
def test_pairs_without_images_or_pixels_touch_nothing(n, size):
    a, out, mid = torch.empty(n, 1, *size, 5), torch.empty(n, 1, *size, 4), torch.full((1, 1, 17, size[1], 3), 7.0)
    cpu_ops.conv_pair(out, mid, a, torch.ones(9, 5, 3), torch.ones(9, 3, 4))
    assert out.shape == (n, 1, *size, 4) and torch.equal(mid, torch.full_like(mid, 7.0))


def test_a_pair_writes_over_channels_that_it_reads():
    """As the last node of a level does in inference: each row is read before it is written."""
    make = cpu_kernels.CpuInputs(torch.float32)
    buffer, wa, second = make.values(2, 1, 44, 20, 12), make.values(9, 12, 5), make.values(9, 5, 6)
    expected = torch.empty(2, 1, 44, 20, 6)
    cpu_ops.conv_pair(expected, torch.empty(1, 1, 17, 20, 5), buffer, wa, second)
    cpu_ops.conv_pair(buffer[..., :6], torch.empty(1, 1, 17, 20, 5), buffer, wa, second)
    assert torch.equal(buffer[..., :6], expected)


def calls(dtype: torch.dtype) -> list[Callable[[], list[Tensor]]]:
    """Convolutions and weight gradients of several blocks of pixels and outputs, which return copies of their results."""
    made = []
    for form in ("full", "node", "edges", "gathered"):
        for units, channels in (((37, 29), (33, 40, 70)), ((3, 5, 6), (33, 40, 70)), ((5, 9), (7, 3, 3))):
            args, options = conv_of(dtype, form, units, channels, add=False)
            made.append(partial(cpu_kernels.run_op, cpu_ops, "conv", args, options, True))
    for units, phased in itertools.product(((37, 29), (3, 5, 6)), (False, True)):
        args, options = wgrad_of(dtype, units, phased, 33, 70)
        made.append(partial(cpu_kernels.run_op, cpu_ops, "conv_wgrad", args, options, False))
    return made


@each_kernel
def test_bits_are_those_of_any_number_of_threads(kernel, threads):
    for index, call in enumerate(calls(dtypes_of(kernel)[0])):
        results = []
        for count in (1, 2, 3, 2):
            threads(count)
            cpu_weights._kept.clear()
            results.append(call())
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), index


@each_kernel
def test_python_threads_at_once(kernel):
    dtype = dtypes_of(kernel)[0]
    expected = [call() for call in calls(dtype)]
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: [call() for call in calls(dtype)], range(4)))
    for results in runs:
        for a, b in zip(expected, results, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def resident() -> int:
    """MiB of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_memory_stays_flat_over_a_thousand_shapes():
    chosen = random.Random(0)

    def once() -> None:
        axes, form = chosen.choice((2, 2, 3)), chosen.choice(list(FORMS))
        units = tuple(chosen.randint(1, 9 if axes == 2 else 3) for _ in range(axes))
        channels = tuple(chosen.randint(1, 40) for _ in range(3))
        kernel = chosen.choice(cpu_kernels.kernels_here())
        cpu_kernels.select(kernel)
        args, options = conv_of(dtypes_of(kernel)[0], form, units, channels)
        cpu_ops.conv(*args, **options)
        if chosen.random() < 0.3:
            args, options = wgrad_of(dtypes_of(kernel)[0], units, chosen.random() < 0.5, *channels[:2])
            cpu_ops.conv_wgrad(*args, **options)

    usual = {name: getattr(cpu_ops, name) for name in cpu_kernels.CHOICES}
    try:
        for _ in range(300):
            once()
        before = resident()
        for _ in range(1000):
            once()
    finally:
        vars(cpu_ops).update(usual)
    assert resident() <= before + 8
