"""Calls of the CUDA ops for the emulation, and the rule that their results have to meet."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from support.helpers import FLOAT32, max_error
from torch import Tensor

from unetpp_fast.kernels import naive

PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)
TF32_STEP = 2.0**-10  # of its mantissa; tensor cores sum in float32


class Inputs:
    """Seeded tensors. Maps are slices of buffers full of NaN; vectors are whole.

    aligned: whether pixels start at multiples of 16 bytes, which decides how a kernel loads them.
    """

    def __init__(self, dtype: torch.dtype, aligned: bool, seed: int = 0) -> None:
        self.dtype, self.generator = dtype, torch.Generator().manual_seed(seed)
        self.unit, self.first = (16, 0) if aligned else (1, 1)  # in values: alignment of a pixel, and offset of the first

    def values(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype or self.dtype)

    def map(self, images: int, size: Sequence[int], channels: int, after: bool = True) -> Tensor:
        """`[N, D, H, W, C]` with other channels before it and, if `after`, after it; the storage ends with the last.

        size: D, H, W or, with D = 1, H, W.
        """
        size = (1, *size)[-3:]
        before = 3 * self.unit
        step = -(-(before + channels + 2 * after) // self.unit) * self.unit
        storage = torch.full([self.first + images * math.prod(size) * step], math.nan, dtype=self.dtype)
        view = storage[self.first :].view(images, *size, step)[..., before : before + channels]
        view.copy_(self.values(*view.shape))
        return view

    def affine(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        scale, shift = (self.values(rows, channels, dtype=torch.float32) for _ in range(2))
        return scale, 0.3 * shift


def conv_case(
    dtype: torch.dtype, size: tuple[int, ...], *, n: int = 2, ka: int = 40, kb: int = 0, co: int = 32, taps: int = 3,
    phased: bool = False, affine: str = "", bias: bool = False, border: bool = False, aligned: bool = True, seed: int = 0,
    **options,
) -> tuple[Tensor, Tensor, Tensor, dict]:  # fmt: skip
    """out, a, wa and the options of a call.

    size: of out, 2 or 3 axes. affine: how many rows for a and then for b, "1" or "n".
    """
    make = Inputs(dtype, aligned, seed)
    around = 2 if taps == 4 else 1
    axes = len(size)
    a = make.map(n, [axis * around for axis in size], ka)
    wa = make.values(taps**axes, ka, co) / math.sqrt(taps**axes * ka)
    options |= {"axes": axes, "taps": taps, "stride": 2 if taps == 4 or phased else 1, "phased": phased}
    rows = [1 if kind == "1" else n for kind in affine.split()]
    if rows:
        options["affine_a"] = make.affine(rows[0], ka)
    if kb:
        low = tuple(axis // 2 if phased else axis for axis in size)
        count, taps_b = (2**axes, 2**axes) if phased else (1, 3**axes)
        options |= {
            "b": make.map(n, low, kb, after=False),
            "wb": make.values(count, taps_b, kb, co) / math.sqrt(taps_b * kb),
        }
        if len(rows) > 1:
            options["affine_b"] = make.affine(rows[1], kb)
    for name, wanted, shape in (("bias", bias, (co,)), ("border", border, (3**axes, co))):
        if wanted:
            options[name] = make.values(*shape, dtype=torch.float32)
    return make.map(n, size, co), a, wa, options


def double(value):
    """Tensors in float64; anything else unchanged."""
    if isinstance(value, tuple):
        return tuple(double(part) for part in value)
    return value.double() if isinstance(value, Tensor) else value


def rounded(value):
    """As tensor cores read maps and weights: float32 rounded to TF32, to nearest; half precisions unchanged."""
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        bits = (value.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF
        return torch.where(value.isfinite(), bits.view(torch.float32), value)
    return value


def twin_conv(out: Tensor, a: Tensor, wa: Tensor, options: dict) -> None:
    """The call in the map's own precision, float32 as TF32: operands are activated, then rounded."""
    if out.dtype != torch.float32:
        naive.conv(out, a, wa, **options)
        return
    options = dict(options)
    slope = options.get("slope", 0.0)
    for name in ("b", "wb"):
        if options.get(name) is not None:
            value = naive.read(options[name], options.pop("affine_b", None), slope) if name == "b" else options[name]
            options[name] = rounded(value)
    a = rounded(naive.read(a, options.pop("affine_a", None), slope))
    naive.conv(out, a, rounded(wa), **options)


def assert_two_times(actual: Tensor, exact: Tensor, twin: Tensor, dtype: torch.dtype) -> None:
    """max|actual - exact| <= 2 max|twin - exact| + a rounding of the result; float32 sums: at least 1e-5 of the largest."""
    assert actual.shape == exact.shape == twin.shape, f"{actual.shape}, expected {exact.shape}"
    if not exact.numel():
        return
    largest, bound = exact.abs().max().item(), 2 * max_error(twin, exact)
    if actual.dtype == torch.float32:
        bound = max(bound, FLOAT32 * largest)
    bound += 0 if actual.dtype == torch.float32 else torch.finfo(dtype).eps / 2 * largest
    error = max_error(actual, exact)
    assert math.isfinite(error) and error <= bound, f"error {error:.3e} over {bound:.3e}, values to {largest:.3e}"


def bits(x: Tensor) -> Tensor:
    """The bytes of the whole storage of x, NaN included."""
    return torch.empty(0, dtype=torch.uint8).set_(x.untyped_storage()).clone()


def inputs_of(values: Sequence) -> list[Tensor]:
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in parts if isinstance(part, Tensor)]


def check_conv(conv, config, dtype: torch.dtype, size: tuple[int, ...], **case) -> None:
    """One call of `conv` against the oracle: values and statistics; nothing around the map and no input is written."""
    out, a, wa, options = conv_case(dtype, size, **case)
    given = inputs_of([a, wa, *options.values()])
    before = [bits(x) for x in given]
    exact, twin = out.double().clone(), out.clone()
    naive.conv(exact, double(a), double(wa), **{name: double(value) for name, value in options.items()})
    twin_conv(twin, a, wa, options)
    parts = conv(out, a, wa, config=config, **options)
    assert_two_times(out, exact, twin, dtype)
    whole = torch.empty(0, dtype=out.dtype).set_(out.untyped_storage())
    assert whole.isnan().sum() == whole.numel() - out.numel(), "written beside the map, or NaN in it"
    assert all(torch.equal(bits(x), old) for x, old in zip(given, before, strict=True)), "an input was written"
    assert (parts is not None) == bool(options.get("stats"))
    if parts is not None:
        check_statistics(parts, out)


def check_statistics(parts: Tensor, out: Tensor) -> None:
    """The parts `[N, T, 3, CO]`, combined, are the statistics of the stored values of every image."""
    assert parts.shape[0] == out.shape[0] and parts.shape[2:] == (3, out.shape[-1])
    assert (parts[:, :, 0].sum(1) == math.prod(out.shape[1:4])).all()
    ones = torch.ones(out.shape[-1], dtype=torch.float64)
    combined = naive.norm_finalise(parts.double(), ones, 0 * ones, 0.1, True)[[0, 4]]
    exact = naive.norm_finalise(naive.statistics(out.double()), ones, 0 * ones, 0.1, True)[[0, 4]]
    for actual, expected in zip(combined.float(), exact, strict=True):
        assert_two_times(actual, expected, expected, torch.float32)


def wgrad_case(
    dtype: torch.dtype, size: tuple[int, ...], *, n: int = 2, k: int = 40, co: int = 32, phased: bool = False,
    rows: int = 0, slope: float = 0.0, aligned: bool = True, seed: int = 0,
) -> tuple[Tensor, Tensor, dict]:  # fmt: skip
    """a, dy and the options of a call; `size` is that of dy. rows: of the affine of a, 0 for none."""
    make = Inputs(dtype, aligned, seed)
    a = make.map(n, [axis // 2 if phased else axis for axis in size], k, after=False)
    dy = make.map(n, size, co)
    options = {"axes": len(size), "phased": phased, "slope": slope}
    return a, dy, options | ({"affine": make.affine(rows, k)} if rows else {})


def check_wgrad(conv_wgrad, config, dtype: torch.dtype, size: tuple[int, ...], **case) -> Tensor:
    """As `check_conv`; returns the gradient."""
    a, dy, options = wgrad_case(dtype, size, **case)
    before = [bits(x) for x in (a, dy)]
    exact = naive.conv_wgrad(double(a), double(dy), **{name: double(value) for name, value in options.items()})
    plain = {name: value for name, value in options.items() if name != "affine"}
    read = naive.read(a, options.get("affine"), options["slope"])
    twin = naive.conv_wgrad(rounded(read), rounded(dy), **plain).float()
    actual = conv_wgrad(a, dy, config=config, **options)
    assert actual.dtype == torch.float32
    assert_two_times(actual, exact, twin, dtype)
    assert all(torch.equal(bits(x), old) for x, old in zip((a, dy), before, strict=True)), "an input was written"
    return actual
