"""The ops of `naive.py` by the CUDA kernels of `csrc/` where they can run, by the Triton kernels elsewhere.

The CUDA kernels serve narrow maps. `can_run_conv` and `can_run_conv_wgrad` say whether they take a call and if not, why.
Their library registers `torch.ops.unetpp_fast_cuda`; `execution/fused/libraries.py` loads it. Where calls are measured
(`tuning.measuring`), the Triton kernels are among the candidates.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from . import triton_ops, tuning
from .conv import check_call
from .maps import check_affine, check_map, device_of, unit_grid
from .naive import Affine, dot_precision
from .triton_ops import (
    act_backward,
    border_sums,
    head,
    head_backward,
    norm_backward,
    norm_table,
    pool,
    pool_backward,
)

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
    "norm_table",
    "pool",
    "pool_backward",
]

WIDEST = 64  # channels of the narrower side
MOST_PLANES = 65535  # of a batch: blocks along the last axis of a grid
HALF = (torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class ConvConfig:
    """One instance of `csrc/conv.h`, by its place in `CONFIGS`.

    A block computes `rows` x `columns` pixels of `block_co` channels and takes `shared` bytes of shared memory.
    `gathered`: the instances for four taps at a stride of two, the data gradient of the low source.
    """

    block_co: int
    rows: int
    stages: int
    gathered: bool
    shared: int

    @property
    def columns(self) -> int:
        return 16 if self.gathered else 32


CONFIGS = (
    ConvConfig(32, 16, 1, False, 57600),
    ConvConfig(32, 8, 2, False, 80384),
    ConvConfig(64, 8, 1, False, 72448),
    ConvConfig(64, 8, 2, False, 144896),
    ConvConfig(32, 16, 1, True, 106752),
    ConvConfig(32, 8, 1, True, 71936),
    ConvConfig(64, 8, 1, True, 104704),
    ConvConfig(64, 4, 1, True, 87296),
)
TRITON = ConvConfig(0, 0, 0, False, 0)  # stands for the Triton kernels among the candidates


@dataclasses.dataclass(frozen=True)
class WgradConfig:
    """The kernel of `csrc/conv_wgrad.h` with its pixels split over about `blocks` blocks."""

    blocks: int


WGRAD_CONFIGS = (WgradConfig(264), WgradConfig(528))  # two or four for each multiprocessor of the largest GPUs
WGRAD_TRITON = WgradConfig(0)  # as `TRITON`


@dataclasses.dataclass(frozen=True)
class ConvCall:
    """The arguments of one call of `naive.conv`."""

    out: Tensor
    a: Tensor
    wa: Tensor
    axes: int
    taps: int
    stride: int
    phased: bool
    affine_a: Affine | None
    b: Tensor | None
    wb: Tensor | None
    affine_b: Affine | None
    slope: float
    plain: int
    bias: Tensor | None
    border: Tensor | None
    act: bool
    add: bool
    stats: bool

    @property
    def gathered(self) -> bool:
        return self.taps == 4


@dataclasses.dataclass(frozen=True)
class WgradCall:
    """The arguments of one call of `naive.conv_wgrad`."""

    a: Tensor
    dy: Tensor
    axes: int
    phased: bool
    affine: Affine | None
    slope: float
    plain: int


def configs(co: int, gathered: bool) -> list[ConvConfig]:
    """The instances worth timing, best first by the static model; some fit every GPU since compute capability 8.0."""
    return [config for config in CONFIGS if config.gathered == gathered and (config.block_co == 64) == (co > 32)]


@functools.cache
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may take."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def can_run_conv(
    out: Tensor, a: Tensor, *, taps: int = 3, stride: int = 1, phased: bool = False, plain: int = 0
) -> tuple[bool, str]:
    """Whether the CUDA kernel takes such a call of `conv`, and if not, why."""
    runs, reason = _can_run(a, out, plain)
    if runs and (taps, stride, phased) not in ((3, 1, False), (3, 2, True), (4, 2, False)):
        return False, f"no CUDA kernel for {taps} taps at a stride of {stride}"
    if runs and out.shape[0] * out.shape[1] > MOST_PLANES:
        return False, f"the batch has more than {MOST_PLANES} planes"
    return runs, reason


def can_run_conv_wgrad(a: Tensor, dy: Tensor, plain: int = 0) -> tuple[bool, str]:
    """Whether the CUDA kernel takes such a call of `conv_wgrad`, and if not, why."""
    return _can_run(a, dy, plain)


def _can_run(first: Tensor, second: Tensor, plain: int) -> tuple[bool, str]:
    if plain:
        return False, "no CUDA kernel reads some channels of a map as they are and activates others"
    if not first.shape[-1]:
        return False, "no CUDA kernel for a low source alone"
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
    plain: int = 0,
    bias: Tensor | None = None,
    border: Tensor | None = None,
    act: bool = False,
    add: bool = False,
    stats: bool = False,
    config: ConvConfig | None = None,
) -> Tensor | None:
    """`naive.conv`. Statistics come as `[N, T, 3, CO]`, one of T parts per tile."""
    call = ConvCall(
        out, a, wa, axes=axes, taps=taps, stride=stride, phased=phased, affine_a=affine_a, b=b, wb=wb, affine_b=affine_b,
        slope=slope, plain=plain, bias=bias, border=border, act=act, add=add, stats=stats,
    )  # fmt: skip
    if not can_run_conv(out, a, taps=taps, stride=stride, phased=phased, plain=plain)[0]:
        return _run_conv(call, TRITON)
    check_call(
        out, a, wa, axes=axes, taps=taps, stride=stride, phased=phased, affine_a=affine_a, b=b, wb=wb, affine_b=affine_b,
        bias=bias, border=border,
    )  # fmt: skip
    if call.gathered and b is not None:
        raise ValueError("a data gradient has one operand")
    return _run_conv(call, config or _chosen_config(call))


def _chosen_config(call: ConvCall) -> ConvConfig:
    """The candidate measured to be the fastest for such a call; if nothing was measured the first of `configs` that fits."""
    out, a, b = call.out, call.a, call.b
    candidates = configs(out.shape[-1], call.gathered)
    if not out.is_cuda or not out.numel():
        return candidates[0]
    candidates = [config for config in candidates if config.shared <= _shared_memory(out.device)]
    flags = f"{'phased ' * call.phased}{'affine ' * (call.affine_a is not None)}{'stats' * call.stats}"
    channels = a.shape[-1], 0 if b is None else b.shape[-1], out.shape[-1]
    sizes = out.shape[0], *unit_grid(out, call.axes, call.phased)
    key = tuning.key("cuda conv", a, f"{call.axes}d taps{call.taps} stride{call.stride} {flags}", channels, sizes)

    def run(candidate: ConvConfig) -> None:
        _run_conv(dataclasses.replace(call, out=torch.empty_like(out)), candidate)

    return tuning.choose(key, sizes, lambda: [*candidates, TRITON], run)


def _run_conv(call: ConvCall, config: ConvConfig) -> Tensor | None:
    """Runs a call by an instance of the CUDA kernel or, if `TRITON`, by the Triton kernels. Returns its statistics."""
    if config == TRITON:
        return triton_ops.conv(**vars(call))
    out, stats = call.out, None
    if call.stats:
        tiles = out.shape[1] * _tiles_per_plane(out, config.rows, config.columns)
        stats = out.new_empty(out.shape[0], tiles, 3, out.shape[-1], dtype=torch.float32)
    if out.numel():
        scale_a, shift_a = call.affine_a or (None, None)
        scale_b, shift_b = call.affine_b or (None, None)
        with device_of(out):
            torch.ops.unetpp_fast_cuda.conv(
                out,
                call.a, call.wa, scale_a, shift_a,
                call.b, call.wb, scale_b, shift_b,
                call.bias, call.border, stats,
                call.axes, call.phased and call.b is not None, float(call.slope), call.act, call.add,
                CONFIGS.index(config),
            )  # fmt: skip
    return stats


def conv_wgrad(
    a: Tensor,
    dy: Tensor,
    *,
    axes: int,
    phased: bool = False,
    affine: Affine | None = None,
    slope: float = 0.0,
    plain: int = 0,
    config: WgradConfig | None = None,
) -> Tensor:
    """`naive.conv_wgrad`: `[1, 3^axes, K, CO]`, with `phased` `[2^axes, 2^axes, K, CO]` for the low source, in float32."""
    call = WgradCall(a, dy, axes=axes, phased=phased, affine=affine, slope=slope, plain=plain)
    if not can_run_conv_wgrad(a, dy, plain)[0]:
        return _run_wgrad(call, WGRAD_TRITON)
    units = unit_grid(dy, axes, phased)
    check_map("dy", dy, dy)
    check_map("a", a, dy, units)
    check_affine("affine", affine, a)
    return _run_wgrad(call, config or _chosen_wgrad_config(call))


def _chosen_wgrad_config(call: WgradCall) -> WgradConfig:
    """As `_chosen_config`."""
    a, dy = call.a, call.dy
    if not a.is_cuda or not dy.numel():
        return WGRAD_CONFIGS[0]
    form = f"{call.axes}d {'phased ' * call.phased}{'affine' * (call.affine is not None)}"
    sizes = a.shape[0], *unit_grid(dy, call.axes, call.phased)
    key = tuning.key("cuda conv_wgrad", a, form, (a.shape[-1], dy.shape[-1]), sizes)
    return tuning.choose(key, sizes, lambda: [*WGRAD_CONFIGS, WGRAD_TRITON], lambda candidate: _run_wgrad(call, candidate))


def _run_wgrad(call: WgradCall, config: WgradConfig) -> Tensor:
    """As `_run_conv`; returns the gradient."""
    if config == WGRAD_TRITON:
        return triton_ops.conv_wgrad(**vars(call))
    a, dy, phased = call.a, call.dy, call.phased
    phases, taps = (2**call.axes, 2**call.axes) if phased else (1, 3**call.axes)
    result = a.new_zeros(phases, taps, a.shape[-1], dy.shape[-1], dtype=torch.float32)
    if dy.numel():
        scale, shift = call.affine or (None, None)
        sums = _splits(call, config) * _sums_per_block(a, phased)
        partial = a.new_empty(sums, *(result.shape if phased else result.shape[1:]), dtype=torch.float32)
        with device_of(a):
            torch.ops.unetpp_fast_cuda.conv_wgrad(a, scale, shift, dy, partial, result, call.axes, phased, float(call.slope))
    return result


def _splits(call: WgradCall, config: WgradConfig) -> int:
    """How many ways the pixels are split: about `config.blocks` blocks in all, and at least a tile for each split.

    A block takes 64 bytes of channels on both sides, and in 3D one plane of taps (of a phase).
    """
    a, dy = call.a, call.dy
    chunk = 64 // a.element_size()
    planes = 1 if call.axes == 2 else 4 if call.phased else 3
    blocks_per_split = planes * math.ceil(a.shape[-1] / chunk) * math.ceil(dy.shape[-1] / chunk)
    tiles = a.shape[0] * a.shape[1] * _tiles_per_plane(dy, 8, 32)
    return min(tiles, max(1, config.blocks // blocks_per_split))


def _tiles_per_plane(x: Tensor, rows: int, columns: int) -> int:
    """Tiles of rows x columns pixels in a plane of a map."""
    return math.ceil(x.shape[2] / rows) * math.ceil(x.shape[3] / columns)


def _sums_per_block(x: Tensor, phased: bool) -> int:
    """Sums that a block writes: one per parity of the columns, unless phases keep them apart; in TF32 by four bands."""
    return (1 if phased else 2) * (1 if x.element_size() == 2 else 4)
