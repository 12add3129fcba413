"""The convolutions compile for every GPU generation without a GPU: no spills, shared memory that fits, tensor cores in use.

`pytest -s` prints the registers, spills and shared memory of each kernel. With UNETPP_FAST_COMPILE_ALL=1, of every
combination of form, width, precision, generation and Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from support.compiled_kernels import ALL, AMD, SHARED_MEMORY, Launch, assert_all_compile, compile_all, main
from support.triton_versions import VERSIONS

HALF = (torch.float16, torch.bfloat16)
WIDTHS = (32, 64, 128, 512)


class Recorder:
    """Stands for a kernel and keeps what its launcher passes."""

    def __init__(self, kernel) -> None:
        self.kernel = kernel
        self.launches: list[tuple[tuple, dict]] = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def record(module, name: str, call, *args, **kwargs):
    """The kernel `name` of a module and the arguments that `call` launches it with."""
    recorder = Recorder(getattr(module, name))
    setattr(module, name, recorder)
    try:
        call(*args, **kwargs)
    finally:
        setattr(module, name, recorder.kernel)
    return recorder.kernel, *recorder.launches[0]


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def conv_case(capability: int, axes: int, width: int, dtype: torch.dtype, form: str) -> Iterator[tuple]:
    """Launches of every configuration of `kernels/conv.py` for one node of 2 or 3 axes."""
    from unetpp_fast.kernels import conv, conv_configs

    shared = SHARED_MEMORY[capability]
    side = 16384 // width if axes == 2 else 2048 // width
    size = (1, side, side) if axes == 2 else (side, side, side)
    half = tuple(max(1, s // 2) for s in size)
    double = (1, 2 * side, 2 * side) if axes == 2 else (2 * side,) * 3
    options = {"axes": axes}
    sizes = double if form == "dlow" else size
    phased = form in ("node", "given")
    few = 1 if form == "image" else width
    a = empty(4, *sizes, few if form == "image" else width * 5, dtype=dtype)[..., :few]
    if phased:
        low = min(2 * width, 512)
        affine_a, affine_b = ((empty(1, k), empty(1, k)) for k in (width, low))
        options |= {"phased": True, "stride": 2, "affine_a": affine_a, "affine_b": affine_b, "stats": True}
        options |= {"b": empty(4, *half, low, dtype=dtype), "wb": empty(2**axes, 2**axes, low, width, dtype=dtype)}
        options |= {"bias": empty(width), "border": empty(3**axes, width), "plain": width // 2 if form == "given" else 0}
    elif form == "dlow":
        options |= {"taps": 4, "stride": 2}
    elif form == "dprefix":
        options |= {"add": True}
    elif form == "norm":
        options |= {"affine_a": (empty(4, width), empty(4, width)), "stats": True}
    weights = empty(options.get("taps", 3) ** axes, few, width, dtype=dtype)
    out = empty(4, *size, width * 5, dtype=dtype)[..., :width]
    units = conv.unit_grid(out, axes, phased)
    configs = conv_configs.configs(units, 4, width, axes, phased, dtype, shared, "affine_a" in options)
    for config in configs:
        yield config, *record(conv, "_conv_kernel", conv.conv, out, a, weights, config=config, **options)


def wgrad_case(capability: int, axes: int, width: int, dtype: torch.dtype, form: str) -> Iterator[tuple]:
    """Launches of every configuration of `kernels/conv_wgrad.py`."""
    from unetpp_fast.kernels import conv, conv_wgrad

    side = 16384 // width if axes == 2 else 2048 // width
    dy = empty(4, *((1, side, side) if axes == 2 else (side, side, side)), width, dtype=dtype)
    phased = form == "low"
    units = conv.unit_grid(dy, axes, phased)
    a = empty(4, *units, width * 5, dtype=dtype)[..., :width]
    affine = {"plain": None, "low": (empty(1, width), empty(1, width)), "image": (empty(4, width), empty(4, width))}[form]
    for config in conv_wgrad.configs(units, width, width, axes, phased, dtype):
        call = {"axes": axes, "phased": phased, "affine": affine, "config": config}
        yield config, *record(conv_wgrad, "_conv_wgrad_kernel", conv_wgrad.conv_wgrad, a, dy, **call)


def cases(capability: int) -> Iterator[tuple]:
    """(name, launches).

    Unless ALL: one half precision per case (the two differ only in conversions), TF32 once, three axes at both ends of the
    widths, and 512, whose blocks are those of 128, only in the largest kernels. For AMD one width of either kind.
    """
    forms = [(conv_case, form) for form in ("norm", "node", "given", "dprefix", "dlow", "plain", "image")]
    forms += [(wgrad_case, form) for form in ("plain", "image", "low")]
    for (case, form), axes, width in itertools.product(forms, (2, 3), WIDTHS):
        if capability == AMD and not ALL and (axes, width) not in ((2, 64), (3, 32)):
            continue
        for dtype in (*HALF, torch.float32):
            if form == "given" and not ALL and (axes, width, dtype) != (2, 64, torch.float16):
                continue
            if (case, form) == (conv_case, "plain") and not ALL and width != 128:  # the largest tiles are for these alone
                continue
            if form == "image" and not ALL and width != 32:
                continue
            heavy = form in ("node", "low")
            if axes == 2:
                half = dtype == torch.float16 and (width < 512 or heavy)
            else:
                half = dtype == torch.bfloat16 and ((form == "node" and width in (32, 128)) or form == "image")
            if ALL or half or (dtype == torch.float32 and axes == 2 and heavy and width == 64):
                name = f"{case.__name__[:-5]} {form} {axes}D {width} {str(dtype)[6:]}"
                yield name, case(capability, axes, width, dtype, form)


def source_of(kernel, args: tuple, kwargs: dict):
    """A launch as the compiler takes it, specialised as the launcher's arguments would be."""
    from triton.compiler import ASTSource

    types = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float64: "*fp64"}
    kwargs = dict(kwargs)
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages")} | kernel.run.keywords
    kwargs |= zip(kernel.arg_names, args, strict=False)
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = kwargs[name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = types[value.dtype] if tensor else "i32" if abs(value) < 2**31 else "i64"
        is_aligned = (value.storage_offset() * value.element_size() if tensor else value) % 16 == 0
        if is_aligned and not parameter.do_not_specialize_on_alignment:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes), options


def launches(capability: int) -> Iterator[Launch]:
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    for name, calls in cases(capability):
        for config, kernel, args, kwargs in calls:
            shape = "x".join(str(int(part)) for part in vars(config).values())
            yield Launch(name, shape, *source_of(kernel, args, kwargs), multiplies=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_without_spills(version: str):
    fewest = {80: 28, 90: 95, 120: 28} if version == "installed" else {80: 2, 90: 28, 120: 2}
    assert_all_compile(compile_all(version, __file__), fewest)


def test_compiles_for_amd():
    """On its matrix cores, without spills, in the 64 KiB of a compute unit."""
    assert_all_compile(compile_all("installed", __file__, (AMD,)), {AMD: 10})


if __name__ == "__main__":
    main(launches)
