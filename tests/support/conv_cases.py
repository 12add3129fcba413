"""Calls of the convolution kernels, and the rule by which their results are judged."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from support.kernel_cases import DEVICE
from torch import Tensor

from unetpp_fast.kernels import naive

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

    device = DEVICE
    start = 5  # of a buffer in its storage: no address is a round number

    def __init__(self, dtype: torch.dtype, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        made = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return made.to(device=self.device, dtype=dtype or self.dtype)

    def map(self, *shape: int, before: int = 3, after: int = 2) -> Tensor:
        """`[N, D, H, W, C]` inside a buffer with `before` and `after` more channels, itself inside a larger storage."""
        images, *size, channels = shape
        width = before + channels + after
        count = images * math.prod(size) * width + self.start
        storage = torch.full([count], math.nan, dtype=self.dtype, device=self.device)
        buffer = storage[self.start :].view(images, *size, width)
        view = buffer[..., before : before + channels]
        view.copy_(self.values(*shape))
        return view

    def vector(self, *shape: int) -> Tensor:
        return self.values(*shape, dtype=naive.accumulator(self.dtype))

    def affine(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        return self.vector(rows, channels), self.vector(rows, channels)


class Aligned(Inputs):
    """Maps as level buffers of even widths hold them: every address and step a multiple of 16 bytes."""

    start = 8

    def map(self, *shape: int, before: int = 8, after: int = 0) -> Tensor:
        return super().map(*shape, before=before, after=-shape[-1] % 8 + 8)


def bits(x: Tensor) -> Tensor:
    """The bytes of the whole storage of x, NaN included."""
    storage = torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())
    return storage.clone()


def double(value):
    """The same in float64; anything but tensors unchanged."""
    if isinstance(value, tuple):
        return tuple(double(part) for part in value)
    return value.double() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def empty_holds_nan() -> Iterator[None]:
    """Inside, on a CPU, tensors allocated without values hold NaN, so that one that is read before it is written shows.

    The interpreter runs programs in one order: there is nothing else that could differ from run to run.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or DEVICE == "cpu")  # with torch.utils.deterministic's default, which fills
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def conv_case(
    dtype: torch.dtype, axes: int, size: tuple[int, ...], n: int = 2, ka: int = 5, kb: int = 0, co: int = 17,
    taps: int = 3, strided: bool = False, phased: bool = False, affine: str = "", bias: bool = False, border: bool = False,
    seed: int = 0, inputs: type[Inputs] = Inputs, **options,
) -> tuple[Tensor, Tensor, Tensor, dict]:  # fmt: skip
    """out, a, wa and the options of a call; `size` is that of out. `affine`: "shared" or "image", of a and then of b."""
    make = inputs(dtype, seed)
    size = (1, *size) if axes == 2 else size
    stride = 2 if phased or strided or taps == 4 else 1
    on = (axes == 3, True, True)
    units = tuple(s // 2 if phased and o else s for s, o in zip(size, on, strict=True))
    kinds = dict(zip("ab", affine.split(), strict=False))
    rows = {"shared": 1, "image": n}
    a = make.map(n, *(u * stride if o else u for u, o in zip(units, on, strict=True)), ka, before=0)
    wa = make.values(taps**axes, ka, co) / math.sqrt(taps**axes * max(ka, 1))
    options |= {"axes": axes, "taps": taps, "stride": stride, "phased": phased}
    if "a" in kinds:
        options["affine_a"] = make.affine(rows[kinds["a"]], ka)
        for part in options["affine_a"]:
            part[:, : options.get("plain", 0)] = math.nan  # not read
    if kb:
        count, taps_b = (2**axes, 2**axes) if phased else (1, 3**axes)
        half = [u // 2 if o and options.get("linear") is not None else u for u, o in zip(units, on, strict=True)]
        options |= {"b": make.map(n, *half, kb), "wb": make.values(count, taps_b, kb, co) / math.sqrt(taps_b * kb)}
        if "b" in kinds:
            options["affine_b"] = make.affine(rows[kinds["b"]], kb)
    if bias:
        options["bias"] = make.vector(co)
    if border:
        options["border"] = make.vector(3**axes, co)
    return make.map(n, *size, co), a, wa, options


def check_conv(run: Callable, dtype: torch.dtype, *case, **options) -> None:
    """One call of `run` against the twin: values, statistics, what lies beside them, the inputs; on a GPU a second call
    gives the same bits."""
    out, a, wa, options = conv_case(dtype, *case, **options)
    given = [x for value in (a, wa, *options.values()) for x in (value if isinstance(value, tuple) else (value,))]
    given = [x for x in given if isinstance(x, Tensor)]
    before = [bits(x) for x in given]
    exact, twin, again = out.clone().double(), out.clone(), out.clone()
    naive.conv(exact, double(a), double(wa), **{name: double(value) for name, value in options.items()})
    naive.conv(twin, a, wa, **options)
    with empty_holds_nan():
        parts = run(out, a, wa, **options)
    assert_judged(out, exact, twin, dtype)
    assert all(torch.equal(bits(x), old) for x, old in zip(given, before, strict=True)), "an input was written"
    assert_untouched_beside(out)
    assert (parts is not None) == bool(options.get("stats"))
    if parts is not None:
        check_statistics(parts, out)
    if DEVICE == "cuda":
        parts_again = run(again, a, wa, **options)
        assert torch.equal(out, again)
        assert parts is None or torch.equal(parts, parts_again)


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
    combined = naive.norm_finalise(parts.double(), ones, zeros, 0.1, True)[[0, 4]]
    exact = naive.norm_finalise(naive.statistics(out.double()), ones, zeros, 0.1, True)[[0, 4]]
    for actual, expected in zip(combined, exact, strict=True):
        assert_judged(actual, expected, expected, dtype)


def wgrad_case(
    dtype: torch.dtype, axes: int, size: tuple[int, ...], n: int = 2, k: int = 5, co: int = 17,
    phased: bool = False, affine: int | None = None, slope: float = 0.0, plain: int = 0, inputs: type[Inputs] = Inputs,
) -> tuple[Tensor, Tensor, dict]:  # fmt: skip
    """a, dy and the options of a call; `size` is that of dy, `affine` its number of rows (0: one for each image)."""
    make = inputs(dtype)
    size = (1, *size) if axes == 2 else size
    units = tuple(s // 2 if phased and on else s for s, on in zip(size, (axes == 3, True, True), strict=True))
    options = {"axes": axes, "phased": phased, "slope": slope, "plain": plain}
    if affine is not None:
        options["affine"] = make.affine(affine or n, k)
        for part in options["affine"]:
            part[:, :plain] = math.nan  # not read
    return make.map(n, *units, k, before=0), make.map(n, *size, co), options


def check_wgrad(run: Callable, dtype: torch.dtype, *case, **options) -> None:
    """As `check_conv`."""
    a, dy, options = wgrad_case(dtype, *case, **options)
    before = bits(a), bits(dy)
    exact = naive.conv_wgrad(double(a), double(dy), **{name: double(value) for name, value in options.items()})
    twin = naive.conv_wgrad(a, dy, **options)
    with empty_holds_nan():
        gradient = run(a, dy, **options)
    assert gradient.dtype == twin.dtype
    assert_judged(gradient, exact, twin, dtype)
    assert torch.equal(bits(a), before[0]) and torch.equal(bits(dy), before[1]), "an input was written"
    if DEVICE == "cuda":
        assert torch.equal(gradient, run(a, dy, **options))
