"""The convolution kernel in Triton's interpreter (or on a GPU, where there is one) against its twin in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from unetpp_fast.kernels import conv as kernels
from unetpp_fast.kernels import conv_configs, conv_wgrad, naive

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float64, torch.float32, torch.float16)
# Bounds on max|kernel - float64| / max|float64| where sums are in the map's own precision.
BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_judged(actual: Tensor, exact: Tensor, twin: Tensor, dtype: torch.dtype) -> None:
    """Within the bound of its precision; half precision: at most twice the twin's error, and a rounding of the result."""
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not exact.numel():
        return
    error, scale = (actual.double() - exact).abs().max().item(), exact.abs().max().item()
    if dtype in BOUNDS:
        bound = BOUNDS[dtype] * scale
    else:
        bound = 2 * (twin.double() - exact).abs().max().item() + torch.finfo(dtype).eps / 2 * scale
    assert math.isfinite(error) and error <= bound, f"error {error:.3e} over {bound:.3e}, values to {scale:.3e}"


class Inputs:
    """Seeded tensors; maps are slices of buffers that hold NaN elsewhere, vectors are whole."""

    start = 5  # of a buffer in its storage: no address is a round number

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return made.to(device=DEVICE, dtype=dtype or self.dtype)

    def map(self, *shape: int, before: int = 3, after: int = 2) -> Tensor:
        """`[N, D, H, W, C]` inside a buffer with `before` and `after` more channels, itself inside a larger storage."""
        images, *size, channels = shape
        width = before + channels + after
        storage = torch.full([images * math.prod(size) * width + self.start], math.nan, dtype=self.dtype, device=DEVICE)
        buffer = storage[self.start :].view(images, *size, width)
        view = buffer[..., before : before + channels]
        view.copy_(self.values(*shape))
        return view

    def vector(self, *shape: int) -> Tensor:
        return self.values(*shape, dtype=naive.accumulator(self.dtype))

    def affine(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        return self.vector(rows, channels), self.vector(rows, channels)


def bits(x: Tensor) -> Tensor:
    """What lies in the whole storage of x, NaN included."""
    storage = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    return storage.clone()


def double(value):
    """The same in float64; of what is not a tensor, itself."""
    if isinstance(value, tuple):
        return tuple(double(part) for part in value)
    return value.double() if isinstance(value, Tensor) else value


def make_case(
    dtype: torch.dtype, axes: int, size: tuple[int, ...], n: int = 2, ka: int = 5, kb: int = 0, co: int = 17,
    taps: int = 3, phased: bool = False, affine: str = "", bias: bool = False, border: bool = False, seed: int = 0,
    inputs: type[Inputs] = Inputs, **options,
) -> tuple[Tensor, Tensor, Tensor, dict]:  # fmt: skip
    """out, a, wa and the options of a call; `size` is that of out. `affine`: "shared" or "image", of a and then of b."""
    make = inputs(dtype, seed)
    size = (1, *size) if axes == 2 else size
    stride = 2 if phased or taps == 4 else 1
    on = (axes == 3, True, True)
    units = tuple(s // 2 if phased and o else s for s, o in zip(size, on, strict=True))
    kinds = dict(zip("ab", affine.split(), strict=False))
    rows = {"shared": 1, "image": n}
    a = make.map(n, *(u * stride if o else u for u, o in zip(units, on, strict=True)), ka, before=0)
    wa = make.values(taps**axes, ka, co) / math.sqrt(taps**axes * ka)
    options |= {"axes": axes, "taps": taps, "stride": stride, "phased": phased}
    if "a" in kinds:
        options["affine_a"] = make.affine(rows[kinds["a"]], ka)
    if kb:
        count, taps_b = (2**axes, 2**axes) if phased else (1, 3**axes)
        options |= {"b": make.map(n, *units, kb), "wb": make.values(count, taps_b, kb, co) / math.sqrt(taps_b * kb)}
        if "b" in kinds:
            options["affine_b"] = make.affine(rows[kinds["b"]], kb)
    if bias:
        options["bias"] = make.vector(co)
    if border:
        options["border"] = make.vector(3**axes, co)
    return make.map(n, *size, co), a, wa, options


def check(dtype: torch.dtype, *args, run: Callable = kernels.conv, **kwargs) -> None:
    """One call of `run` against the twin: values, statistics, what lies beside them, and the same bits a second time."""
    out, a, wa, options = make_case(dtype, *args, **kwargs)
    given = [x for value in (a, wa, *options.values()) for x in (value if isinstance(value, tuple) else (value,))]
    given = [x for x in given if isinstance(x, Tensor)]
    before = [bits(x) for x in given]
    exact, twin, again = out.clone().double(), out.clone(), out.clone()
    naive.conv(exact, double(a), double(wa), **{name: double(value) for name, value in options.items()})
    naive.conv(twin, a, wa, **options)
    parts = run(out, a, wa, **options)
    assert_judged(out, exact, twin, dtype)
    assert all(torch.equal(bits(x), old) for x, old in zip(given, before, strict=True)), "an input was written"
    assert_untouched_beside(out)
    parts_again = run(again, a, wa, **options)
    assert torch.equal(out, again)
    assert (parts is not None) == bool(options.get("stats"))
    if parts is not None:
        assert torch.equal(parts, parts_again)
        check_statistics(parts, out)


def assert_untouched_beside(out: Tensor) -> None:
    """All of a map's storage is NaN but for the map."""
    whole = torch.empty(0, dtype=out.dtype, device=out.device).set_(out.untyped_storage())
    assert whole.isnan().sum() == whole.numel() - out.numel(), "written beside the map, or NaN in it"


def check_statistics(parts: Tensor, out: Tensor) -> None:
    """The parts, put together, are those of the values as stored, in every image."""
    assert parts.shape[0] == out.shape[0] and parts.shape[2:] == (3, out.shape[-1])
    if not out.numel():
        return
    ones, zeros = torch.ones_like(parts[0, 0, 0]), torch.zeros_like(parts[0, 0, 0])
    assert (parts[:, :, 0].sum(1) == math.prod(out.shape[1:4])).all()
    dtype = parts.dtype
    found = naive.norm_finalise(parts.double(), ones, zeros, 0.1, True)[[0, 4]]
    exact = naive.norm_finalise(naive.statistics(out.double()), ones, zeros, 0.1, True)[[0, 4]]
    for actual, expected in zip(found, exact, strict=True):
        assert_judged(actual, expected, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("axes, size", [(2, (6, 10)), (3, (2, 4, 6))])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"kb": 3, "affine": "image shared", "slope": 0.1, "act": True, "stats": True},
        {"taps": 4, "add": True},
        {"phased": True, "affine": "shared", "bias": True},
        {"phased": True, "kb": 3, "affine": "shared image", "slope": 0.1, "border": True, "act": True, "stats": True},
    ],
    ids=["plain", "full-resolution", "low-gradient", "phases", "node"],
)
def test_uses(dtype: torch.dtype, axes: int, size: tuple[int, ...], form: dict):
    """Every use of the kernel in every precision."""
    check(dtype, axes, size, n=1 if axes == 3 else 2, **form)


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
        check(dtype, 2, (5, 7), n=3, **option)


@pytest.mark.parametrize("ka, kb, co", [(1, 3, 1), (3, 33, 5), (33, 1, 17), (5, 17, 33)])
def test_channels(ka: int, kb: int, co: int):
    """Odd and unequal widths, below and between the blocks of channels."""
    check(torch.float32, 2, (4, 6), ka=ka, kb=kb, co=co, phased=True, affine="shared image", stats=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("phased", [False, True])
def test_one_pixel_axes(size: tuple[int, int], phased: bool):
    size = tuple(2 * s for s in size) if phased else size
    check(torch.float32, 2, size, phased=phased, kb=3, border=True, stats=True, affine="shared shared")


@pytest.mark.parametrize("size, taps, phased", [((1, 1, 3), 3, False), ((1, 2, 1), 4, False), ((2, 2, 2), 3, True)])
def test_one_pixel_axes_3d(size: tuple[int, int, int], taps: int, phased: bool):
    check(torch.float32, 3, size, n=1, taps=taps, phased=phased, border=True, stats=True, affine="shared")


@pytest.mark.parametrize("n", [0, 1, 3])
def test_batches(n: int):
    check(torch.float32, 2, (2, 4), n=n, phased=True, kb=3, affine="image image", stats=True)


@pytest.mark.parametrize("wide", [False, True])
def test_many_tiles(wide: bool, monkeypatch: pytest.MonkeyPatch):
    """Tiles smaller than the map and hanging over its end; several blocks of channels; offsets of 64 bits."""
    if wide:
        monkeypatch.setattr(kernels, "NARROW_OFFSETS", 0)
    config = conv_configs.Config(1, 2, 8, 16, 16, 4, 1)
    check(torch.float32, 2, (3, 10), n=2, ka=17, co=17, affine="image", stats=True, run=partial(kernels.conv, config=config))
    config = conv_configs.Config(2, 2, 4, 16, 32, 4, 1)
    check(torch.float32, 3, (4, 2, 10), n=1, taps=4, border=True, stats=True, run=partial(kernels.conv, config=config))


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
    out, a, wa, options = make_case(torch.float32, 2, (3, 3), affine="shared", act=True)
    a[0, 0, 1, 1, 0] = math.nan
    kernels.conv(out, a, wa, **options)
    assert out[0].isnan().all() and not out[1].isnan().any()


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
    out, a, wa, options = make_case(torch.float32, 2, (4, 6))
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
        found = conv_configs.default_config(units, 1, k, co, axes, False, torch.float32, True)
        assert found.pixels * max(conv_configs.block_of_channels(k, found.block_k), found.block_co) <= 2**20
        found = conv_wgrad.default_config(units, k, co, axes, False, torch.float32, True)
        assert found.pixels * max(found.block_m, found.block_co) <= 2**20 and found.block_m * found.block_co <= 2**20


def test_configurations():
    """Blocks are powers of two that cover the map and its channels; the first is the default."""
    for units, co, axes in [((1, 512, 512), 32, 2), ((1, 6, 6), 512, 2), ((24, 24, 24), 96, 3), ((1, 3, 100), 5, 2)]:
        found = conv_configs.configs(units, 2, co, axes, True, torch.float16)
        assert found[0] == conv_configs.default_config(units, 2, 16, co, axes, True, torch.float16, False)
        assert len(set(found)) == len(found)
        for config in found:
            assert config.pixels in (64, 128, 256) and config.block_co in (16, 32, 64, 128)
            assert axes == 3 or config.block_d == 1
