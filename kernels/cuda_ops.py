"""The ops of `naive.py` by the CUDA kernels of `csrc/` where they can run, by the Triton kernels elsewhere.

The CUDA kernels serve narrow maps. `can_run_conv` and `can_run_conv_wgrad` say whether they take a call and if not, why.
The library that holds them registers `torch.ops.unetpp_fast_cuda`; `unetpp_fast.extension` loads it. Where calls are
measured (`tuning.measuring`), Triton's kernels are among the candidates.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from . import triton_ops, tuning
from .conv import check_call
from .maps import check_affine, check_map, device_of, dot_precision, unit_grid
from .naive import Affine
from .triton_ops import act_backward, border_sums, head, head_backward, norm_backward, norm_finalise, pool, pool_backward

__all__ = [
    "act_backward",
    "border_sums",
    "can_run_conv",
    "can_run_conv_wgrad",
    "conv",
    "conv_wgrad",
    "head",
    "head_backward",
    "norm_backward",
    "norm_finalise",
    "pool",
    "pool_backward",
]

WIDEST = 64  # channels of the narrower side
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """One instance of `csrc/conv.h`, by its place in `CONFIGS`.

    A block makes `rows` x 32 pixels (gathered: x 16) of `block_co` channels and takes `shared` bytes of shared memory.
    """

    block_co: int
    rows: int
    stages: int
    gathered: bool
    shared: int


CONFIGS = (
    ConvConfig(32, 16, 1, False, 67392),
    ConvConfig(32, 8, 2, False, 91264),
    ConvConfig(64, 8, 1, False, 74176),
    ConvConfig(64, 8, 2, False, 148352),
    ConvConfig(32, 8, 1, True, 81728),
    ConvConfig(64, 4, 1, True, 92736),
)
TRITON = ConvConfig(0, 0, 0, False, 0)  # the candidate that is not ours


def configs(co: int, gathered: bool) -> list[ConvConfig]:
    """The instances worth timing, the one used without timing first: it fits every GPU since compute capability 8.0."""
    return [config for config in CONFIGS if config.gathered == gathered and (config.block_co == 64) == (co > 32)]


def can_run_conv(out: Tensor, a: Tensor, *, taps: int = 3, stride: int = 1, phased: bool = False) -> tuple[bool, str]:
    """Whether the CUDA kernel takes such a call of `conv`, and if not, why."""
    runs, reason = _can_run(a, out)
    if runs and (taps, stride, phased) not in ((3, 1, False), (3, 2, True), (4, 2, False)):
        return False, f"no CUDA kernel for {taps} taps at a stride of {stride}"
    return runs, reason


def _can_run(first: Tensor, second: Tensor) -> tuple[bool, str]:
    if first.dtype not in HALF and (first.dtype != torch.float32 or dot_precision(first.dtype) != "tf32"):
        return False, f"the CUDA kernels multiply float16, bfloat16 and, where TF32 is allowed, float32, not {first.dtype}"
    if min(first.shape[-1], second.shape[-1]) > WIDEST:
        return False, f"both maps have more than {WIDEST} channels"
    return True, ""


def conv(
    out: Tensor,
    a: Tensor,
    wa: Tensor,
    *,
    axes: int,
    taps: int = 3,
    stride: int = 1,
    phased: bool = False,
    affine_a: Affine | None = None,
    b: Tensor | None = None,
    wb: Tensor | None = None,
    affine_b: Affine | None = None,
    slope: float = 0.0,
    bias: Tensor | None = None,
    border: Tensor | None = None,
    act: bool = False,
    add: bool = False,
    stats: bool = False,
    config: ConvConfig | None = None,
) -> Tensor | None:
    """`naive.conv`. Statistics come as `[N, T, 3, CO]`, one of T parts a tile."""
    options = {"affine_a": affine_a, "b": b, "wb": wb, "affine_b": affine_b, "slope": slope, "bias": bias,
               "border": border, "act": act, "add": add, "stats": stats}  # fmt: skip
    geometry = {"axes": axes, "taps": taps, "stride": stride, "phased": phased}
    if not can_run_conv(out, a, taps=taps, stride=stride, phased=phased)[0]:
        return triton_ops.conv(out, a, wa, **geometry, **options)
    units = unit_grid(out, axes, phased)
    check_call(out, a, wa, axes, taps, stride, phased, affine_a, b, wb, affine_b, bias, border)
    if taps == 4 and b is not None:
        raise ValueError("a data gradient has one operand")
    gathered, co = taps == 4, out.shape[-1]

    def launch(config: ConvConfig, out: Tensor) -> Tensor | None:
        if config == TRITON:
            return triton_ops.conv(out, a, wa, **geometry, **options)
        tiles = out.shape[1] * math.ceil(out.shape[2] / config.rows) * math.ceil(out.shape[3] / (16 if gathered else 32))
        partial = out.new_empty(out.shape[0], tiles, 3, co, dtype=torch.float32) if stats else None
        if out.numel():
            pairs = [(affine or (None, None)) for affine in (affine_a, affine_b)]
            with device_of(out):
                torch.ops.unetpp_fast_cuda.conv(
                    out, a, wa, *pairs[0], b, wb, *pairs[1], bias, border, partial, axes, phased and b is not None,
                    float(slope), act, add, CONFIGS.index(config),
                )  # fmt: skip
        return partial

    if config is None and (not out.is_cuda or not out.numel()):
        config = configs(co, gathered)[0]
    elif config is None:
        form = f"{axes}d taps{taps} stride{stride} {'phased ' * phased}{'affine ' * (affine_a is not None)}{'stats' * stats}"
        channels = a.shape[-1], 0 if b is None else b.shape[-1], co
        key = tuning.key("cuda conv", a.dtype, form, channels, (out.shape[0], *units))
        config = tuning.choose(
            key,
            (out.shape[0], *units),
            lambda: [*configs(co, gathered), TRITON],
            lambda candidate: launch(candidate, torch.empty_like(out)),
        )
    return launch(config, out)


def can_run_conv_wgrad(a: Tensor, dy: Tensor) -> tuple[bool, str]:
    """Whether the CUDA kernel takes such a call of `conv_wgrad`, and if not, why."""
    return _can_run(a, dy)


@dataclasses.dataclass(frozen=True)
class WgradConfig:
    """The kernel of `csrc/conv_wgrad.h` with its pixels split over blocks, about `blocks` of them; 0 stands for Triton's."""

    blocks: int


WGRAD_CONFIGS = (WgradConfig(264), WgradConfig(528))  # two or four for each multiprocessor of the largest GPUs


def conv_wgrad(
    a: Tensor,
    dy: Tensor,
    *,
    axes: int,
    phased: bool = False,
    affine: Affine | None = None,
    slope: float = 0.0,
    config: WgradConfig | None = None,
) -> Tensor:
    """`naive.conv_wgrad`: `[1, 3^axes, K, CO]`, with `phased` `[2^axes, 2^axes, K, CO]` for the low source, in float32."""
    options = {"axes": axes, "phased": phased, "affine": affine, "slope": slope}
    if not can_run_conv_wgrad(a, dy)[0]:
        return triton_ops.conv_wgrad(a, dy, **options)
    units = unit_grid(dy, axes, phased)
    check_map("dy", dy, dy)
    check_map("a", a, dy, units)
    check_affine("affine", affine, a)
    k, co = a.shape[-1], dy.shape[-1]
    shape = (*_counts(axes, phased), k, co)

    def launch(config: WgradConfig) -> Tensor:
        if config == WgradConfig(0):
            return triton_ops.conv_wgrad(a, dy, **options)
        result = a.new_zeros(shape, dtype=torch.float32)
        if dy.numel():
            tiles = a.shape[0] * a.shape[1] * math.ceil(dy.shape[2] / 8) * math.ceil(dy.shape[3] / 32)
            slabs = 1 if axes == 2 else 4 if phased else 3
            splits = min(tiles, max(1, config.blocks // (slabs * math.ceil(k / _chunk(a)) * math.ceil(co / _chunk(a)))))
            partial = a.new_empty(splits * _parts(a, phased), *shape[1 - phased :], dtype=torch.float32)
            with device_of(a):
                torch.ops.unetpp_fast_cuda.conv_wgrad(
                    a, *(affine or (None, None)), dy, partial, result, axes, phased, float(slope)
                )
        return result

    if config is None and (not a.is_cuda or not dy.numel()):
        config = WGRAD_CONFIGS[0]
    elif config is None:
        form = f"{axes}d {'phased ' * phased}{'affine' * (affine is not None)}"
        key = tuning.key("cuda conv_wgrad", a.dtype, form, (k, co), (a.shape[0], *units))
        config = tuning.choose(key, (a.shape[0], *units), lambda: [*WGRAD_CONFIGS, WgradConfig(0)], launch)
    return launch(config)


def _counts(axes: int, phased: bool) -> tuple[int, int]:
    """Phases and taps of an operand."""
    return (2**axes, 2**axes) if phased else (1, 3**axes)


def _chunk(x: Tensor) -> int:
    """Channels of a block of the kernel, on both sides."""
    return 64 // x.element_size()


def _parts(x: Tensor, phased: bool) -> int:
    """Sums that a block writes: one for each parity of the columns, unless phases keep them apart; in TF32 by four bands."""
    return (1 if phased else 2) * (1 if x.element_size() == 2 else 4)
