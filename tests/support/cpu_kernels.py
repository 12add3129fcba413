"""Calls of the CPU kernels and the rule by which their results are judged: against the plain PyTorch ops in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from support import conv_cases
from support.conv_cases import Inputs, bits, double
from support.helpers import FLOAT32, max_error
from torch import Tensor

from unetpp_fast.execution import acceptance
from unetpp_fast.execution.fused import libraries
from unetpp_fast.kernels import cpu_ops, naive

DTYPES = [torch.float32, torch.bfloat16]
# What selects each kernel: the least number of tiles for Winograd, and of weights that are transformed as they are read; up
# to how many products data gradients are direct sums; and whose matrix tiles are used.
CHOICES = ("MIN_TILES", "MANY_WEIGHTS", "FEW_PRODUCTS", "TILES")
KERNELS = {
    "winograd": (0, 10**9, -1, ()), "few": (0, 0, -1, ()), "direct": (10**9, 0, -1, ()),
    "tiles": (0, 10**9, -1, ("cpu", "plain")),
}  # fmt: skip
CHANNELS = [  # of a, b and the result: below, at and above vectors and blocks of every instruction set
    (1, 3, 7), (3, 1, 64), (7, 16, 1), (16, 31, 33), (31, 33, 16), (32, 64, 32), (33, 7, 31), (64, 32, 3),
]  # fmt: skip
FORMS = {
    "plain": {"affine": "image", "act": True, "bias": True, "stats": True},
    "full": {"kb": 1, "affine": "image shared", "slope": 0.1, "act": True, "stats": True},
    "edges": {"kb": 1, "linear": False, "affine": "shared image", "slope": 0.1, "act": True, "stats": True},
    "corners": {"kb": 1, "linear": True, "affine": "image", "bias": True, "add": True},
    "gathered": {"taps": 4, "affine": "shared", "add": True},
    "point": {"taps": 1, "affine": "image", "slope": 0.1, "bias": True, "act": "silu"},
    "strided": {"strided": True, "affine": "image", "bias": True, "stats": True},
    "phased": {"phased": True, "affine": "shared", "bias": True, "add": True, "stats": True},
    "node": {"phased": True, "kb": 1, "affine": "shared image", "slope": 0.1, "border": True, "act": True, "stats": True},
}
# Of units: the results of forms with phases, or with a low source that is up-sampled, are twice as large.
SIZES = {
    2: [(1, 1), (1, 37), (37, 1), (2, 6), (6, 7), (7, 13), (13, 37), (37, 2)],
    3: [(1, 1, 1), (2, 6, 7), (7, 1, 13), (1, 13, 2)],
}


def select(kernel: str, to: Callable[[object, str, int], None] = setattr) -> None:
    """Makes `kernel` compute every convolution, whatever its size; `few` knows 2D only, `tiles` bfloat16 only."""
    for name, value in zip(CHOICES, KERNELS[kernel], strict=True):
        to(cpu_ops, name, value)


def dtypes_of(kernel: str) -> list[torch.dtype]:
    """The precisions that a kernel knows."""
    return DTYPES[1:] if kernel == "tiles" else DTYPES


def kernels_here() -> list[str]:
    """The kernels that can run: no matrix tiles where the library is compiled for them and the CPU has none."""
    return [kernel for kernel in KERNELS if kernel != "tiles" or cpu_ops.matrix_tiles()]


def kernel_and_dtype(*kernels: str) -> pytest.MarkDecorator:
    """Each of these kernels (default all) with each precision that it knows."""
    cases = [(kernel, dtype) for kernel in kernels or KERNELS for dtype in dtypes_of(kernel)]
    return pytest.mark.parametrize(("kernel", "dtype"), cases, indirect=["kernel"], ids=str)


def has_library() -> bool:
    return libraries.load("cpu")[0]


def needs_library() -> pytest.MarkDecorator:
    loaded, reason = libraries.load("cpu")
    return pytest.mark.skipif(not loaded, reason=f"the CPU kernels are off: {reason}")


class CpuInputs(Inputs):
    """Maps whose axes of one pixel, image or channel have a stride that means nothing; tables are rows of wider ones."""

    device = "cpu"

    def map(self, *shape: int, before: int = 3, after: int = 2) -> Tensor:
        view = super().map(*shape, before=before, after=after)
        strides = [7 if size == 1 else stride for size, stride in zip(view.shape, view.stride(), strict=True)]
        return view.as_strided(view.shape, strides, view.storage_offset())

    def dense(self, *shape: int) -> Tensor:
        """Contiguous values with NaN on either side."""
        values = self.values(*shape)
        storage = torch.full([values.numel() + 9], torch.nan, dtype=self.dtype)
        view = storage[5 : 5 + values.numel()].view(shape)
        return view.copy_(values)

    def table(self, *rows: Tensor) -> tuple[Tensor, ...]:
        """The rows `[1 or N, C]` as the engine keeps them, slices of one tensor for all channels of a level."""
        stacked = torch.stack(rows)
        wide = torch.full((*stacked.shape[:2], stacked.shape[2] + 5), torch.nan)
        wide[..., 2:-3] = stacked
        return tuple(wide[..., 2:-3].unbind())

    def affine(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        scale, shift = self.table(*super().affine(rows, channels))
        return scale, shift


class TightInputs(CpuInputs):
    """Maps with nothing around them, so that a sanitizer sees whatever is read beside them."""

    start = 0

    def map(self, *shape: int, before: int = 0, after: int = 0) -> Tensor:
        return super().map(*shape, before=0, after=0)

    def dense(self, *shape: int) -> Tensor:
        return self.values(*shape)

    def table(self, *rows: Tensor) -> tuple[Tensor, ...]:
        return tuple(row.clone() for row in rows)


def flat(values) -> list[Tensor]:
    """The tensors among values and tuples of values."""
    parts = [part for value in values for part in (value if isinstance(value, tuple) else (value,))]
    return [part for part in parts if isinstance(part, Tensor)]


def assert_accepted(actual: Tensor, exact: Tensor, twin: Tensor) -> None:
    """The rule of `acceptance`, and in float32 no value off by more than 1e-5 of the largest."""
    assert actual.shape == exact.shape and actual.dtype == twin.dtype
    reason = acceptance.disagreement(*([acceptance.as_vector([x])] for x in (exact, twin, actual)), actual.dtype)
    assert reason == ""
    if actual.dtype == torch.float32 and exact.numel():
        assert max_error(actual, exact) <= max(FLOAT32 * exact.abs().max().item(), 2 * max_error(twin, exact))


def run_op(ops, name: str, args: Sequence, options: dict, writes: bool) -> list[Tensor]:
    """What the op leaves in its first argument, if it writes it, and what it returns."""
    returned = getattr(ops, name)(*args, **options)
    return [*([args[0].clone()] if writes else []), *flat([returned])]


def check_op(name: str, args: Sequence, options: dict) -> None:
    """One call against the twin: results, what lies beside them, the bits of the inputs, and those of a second call."""
    writes = name not in ("conv_wgrad", "border_sums")
    given = flat([*args[writes:], *options.values()])
    before, start = [bits(x) for x in given], args[0].clone()
    exact = run_op(naive, name, [double(x) for x in (start, *args[1:])], {k: double(v) for k, v in options.items()}, writes)
    twin = run_op(naive, name, [start.clone(), *args[1:]], options, writes)
    results = run_op(cpu_ops, name, args, options, writes)
    assert all(torch.equal(bits(x), old) for x, old in zip(given, before, strict=True)), "an input was written"
    if writes:
        conv_cases.assert_untouched_beside(args[0])
        args[0].copy_(start)
    again = run_op(cpu_ops, name, args, options, writes)
    assert all(torch.equal(a, b) for a, b in zip(results, again, strict=True)), "another call gives other bits"
    assert len(results) == len(exact)
    if name == "conv" and options.get("stats"):
        conv_cases.check_statistics(results.pop(), args[0])
    for a, e, t in zip(results, exact, twin, strict=False):
        assert_accepted(a, e, t)


def conv_of(dtype: torch.dtype, form: str, units: tuple[int, ...], channels: tuple[int, int, int] = (5, 3, 17), **options):
    """Arguments and options of a convolution in one of `FORMS`, at `units` pixels or twice as many."""
    case = {"inputs": CpuInputs, "n": 2, **FORMS[form], **options}
    size = tuple(2 * s for s in units) if case.get("phased") or case.get("linear") is not None else units
    ka, kb, co = channels
    case["kb"] = kb if case.get("kb") else 0
    *args, options = conv_cases.conv_case(dtype, len(units), size, ka=ka, co=co, **case)
    return args, options


def check_conv(*case, **options) -> None:
    check_op("conv", *conv_of(*case, **options))


def wgrad_of(dtype: torch.dtype, units: tuple[int, ...], phased: bool = False, k: int = 5, co: int = 17, **options):
    size = tuple(2 * s for s in units) if phased else units
    case = {"k": k, "co": co, "phased": phased, "inputs": CpuInputs, **options}
    a, dy, options = conv_cases.wgrad_case(dtype, len(units), size, **case)
    return (a, dy), options


def check_wgrad(*case, **options) -> None:
    check_op("conv_wgrad", *wgrad_of(*case, **options))


PAIRS = ("phased", "full", "edges", "corners")  # how the low source of a pair is read


def check_pair(
    dtype: torch.dtype, size: tuple[int, int], held: int, low: str = "phased", channels: tuple[int, ...] = (5, 3, 7, 9),
    n: int = 2, slope: float = 0.1, inputs: type[CpuInputs] = CpuInputs,
) -> None:  # fmt: skip
    """`conv_pair` with `held` rows between its convolutions against two plain ones in float64."""
    make, (ka, kb, between, co), phased = inputs(dtype), channels, low == "phased"
    height, width = (s if low == "full" else 2 * s for s in size)
    a, out = make.map(n, 1, height, width, ka), make.map(n, 1, height, width, co)
    wa, second = make.values(9, ka, between), make.values(9, between, co)
    low_options = {
        "b": make.map(n, 1, *size, kb),
        "wb": make.values(4, 4, kb, between) if phased else make.values(1, 9, kb, between),
        "bias": make.vector(between), "border": make.vector(9 * between).view(9, between),
    }  # fmt: skip
    rest = {"phased": phased, "linear": {"edges": False, "corners": True}.get(low), "slope": slope}
    second_bias = make.vector(co)
    mid = torch.full((1, 1, held, width, between), torch.nan, dtype=dtype)

    def plain(kind: torch.dtype) -> Tensor:
        middle, result = (torch.empty(n, 1, height, width, channels, dtype=kind) for channels in (between, co))
        given = (a, wa, low_options, second, second_bias)
        if kind != dtype:
            wide = {name: value.double() for name, value in low_options.items()}
            given = (a.double(), wa.double(), wide, second.double(), second_bias.double())
        xa, first, options, last, last_bias = given
        naive.conv(middle, xa, first, axes=2, stride=2 if phased else 1, act=True, **options, **rest)
        naive.conv(result, middle, last, axes=2, bias=last_bias, slope=slope, act=True)
        return result

    exact, twin = plain(torch.float64), plain(dtype)
    cpu_ops.conv_pair(out, mid, a, wa, second, second_bias=second_bias, **low_options, **rest)
    conv_cases.assert_untouched_beside(out)
    assert_accepted(out, exact, twin)


def map_case(
    name: str, dtype: torch.dtype, size: tuple[int, ...], n: int = 2, channels: int = 5, rows: str = "", slope: float = 0.0,
    add: bool = False, classes: int = 3, mode: str = "batch", inputs: type[CpuInputs] = CpuInputs,
) -> tuple[tuple, dict]:  # fmt: skip
    """Arguments and options of any op that is no convolution, for maps of `size`.

    rows: of the affine, "shared", "image" or "" for none. mode: of norm_backward, "batch", "instance", "frozen" or
    "averages".
    """
    make, axes = inputs(dtype), len(size)
    size = (1, *size) if axes == 2 else size
    half = (size[0] // (axes - 1), size[1] // 2, size[2] // 2)
    x = make.map(n, *size, channels)
    affine = make.affine({"shared": 1, "image": n}[rows], channels) if rows else None
    options = {"affine": affine, "slope": slope}
    if name == "pool":
        return (make.map(n, *half, channels), x), {**options, "axes": axes}
    if name == "pool_backward":
        return (make.map(n, *size, channels), make.map(n, *half, channels), coarse(x)), {**options, "axes": axes, "add": add}
    if name == "head":
        return (make.dense(n, classes, *size), x, make.values(classes, channels), make.vector(classes)), options
    if name == "head_backward":
        gx, dy = make.map(n, *size, channels), make.dense(n, classes, *size)
        return (gx, dy, x, make.values(classes, channels)), {**options, "add": add}
    if name == "norm_backward":
        weight, bias = make.vector(channels), make.vector(channels)
        tables = naive.norm_finalise(naive.statistics(x), weight, bias, 1e-1, mode == "instance")
        mean, inverse, scale, shift = make.table(*tables[:4])
        averages = {"averages": lambda sums, count: sums / (2 * count + 1)} if mode == "averages" else {}
        return (make.map(n, *size, channels), x, mean, inverse, (scale, shift), slope, mode == "frozen"), averages
    if name == "act_backward":
        x[x < 0.2] = 0  # zeros are not above zero
        return (make.map(n, *size, channels), x, slope), {}
    return (x, axes), {}  # border_sums


def coarse(x: Tensor) -> Tensor:
    """Few distinct values, exact in half precision too: ties in most windows of a pool."""
    return x.copy_((2 * x).round() / 2)


def check_map(name: str, *case, **options) -> None:
    check_op(name, *map_case(name, *case, **options))


def small_grid(dtype: torch.dtype, inputs: type[CpuInputs]) -> list[tuple[str, Callable[[], None]]]:
    """A name and a call for each op, kernel and geometry, at odd sizes and widths."""
    calls: list[tuple[str, Callable[[], None]]] = []

    def add(check: Callable, *case, **options) -> None:
        calls.append((f"{case} {options}", partial(check, *case, **options, inputs=inputs)))

    def selected(check: Callable, kernel: str) -> Callable:
        def run(*case, **options) -> None:
            select(kernel)
            check(*case, **options)

        return run

    channels = itertools.cycle(CHANNELS)
    kernels = [kernel for kernel in kernels_here() if dtype in dtypes_of(kernel)]
    for kernel, form, size in itertools.product(kernels, FORMS, [(1, 1), (3, 7), (13, 6), (1, 2, 3), (3, 1, 7)]):
        add(selected(check_conv, kernel), dtype, form, size, next(channels))
    for kernel, form, size in itertools.product(kernels, ("full", "node"), [(3, 7), (1, 2, 3)]):
        alone = selected(check_conv, kernel)
        add(alone, dtype, form, size, (0, 3, 17), affine="")
        add(alone, dtype, form, size, (35, 3, 17), affine="image shared", plain=19)
    for kernel, held, low in itertools.product(kernels[::3], (17, 25), PAIRS):
        add(selected(check_pair, kernel), dtype, (17, 5), held, low)
    for kernel, size, phased in itertools.product(kernels[::3], [(1, 3), (7, 5), (2, 1, 3)], (False, True)):
        k, _, co = next(channels)
        add(selected(check_wgrad, kernel), dtype, size, phased, k, co, affine=1, slope=0.1)
    for name, size in itertools.product(("pool", "pool_backward", "head", "head_backward"), [(2, 6), (14, 2), (2, 4, 6)]):
        more = {"add": True} if name.endswith("backward") else {}
        add(check_map, name, dtype, size, channels=next(channels)[0], rows="image", slope=0.1, **more)
    for name, size in itertools.product(("norm_backward", "act_backward"), [(1, 7), (13, 5), (3, 1, 2)]):
        add(check_map, name, dtype, size, channels=next(channels)[2], slope=0.1)
    return calls


def run_small_grid(library: str, inputs: type[CpuInputs]) -> None:
    """Runs the grid with a library, in a process that has loaded no other; prints its lanes and the number of calls."""
    torch.ops.load_library(library)
    torch.set_num_threads(1)
    cpu_ops.CHUNK = 16
    print(torch.ops.unetpp_fast_cpu.lanes(), flush=True)
    calls = [call for dtype in DTYPES for call in small_grid(dtype, inputs)]
    for name, call in calls:
        try:
            call()
        except Exception as error:
            raise AssertionError(name) from error
    print(len(calls))
