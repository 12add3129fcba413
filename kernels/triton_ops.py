"""The ops of `naive.py` on a GPU, under the same names: Triton kernels and, where measured faster, PyTorch's convolutions.

A convolution can be done in several ways, and which is fastest depends on the GPU and the shape:

    fused       one kernel, norm and activation applied to an operand each time it is loaded
    finalise    norm and activation applied once, in a separate pass, then the kernel without them
    library     PyTorch's convolution (cuDNN) on dense, activated copies of the operands (`library.py`)

`tuning.choose` picks the one measured to be the fastest, or the first of the list if nothing was measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import conv as fused
from . import conv_wgrad as fused_wgrad
from . import library, tuning
from .conv_configs import LEAST_SHARED, configs
from .head import head, head_backward
from .maps import interpreted, per_shape, unit_grid
from .naive import dot_precision
from .norm import act_backward, border_sums, norm_backward, norm_table
from .pool import pool, pool_backward
from .read import read

__all__ = [
    "act_backward",
    "border_sums",
    "conv",
    "conv_wgrad",
    "head",
    "head_backward",
    "norm_backward",
    "norm_table",
    "pool",
    "pool_backward",
]


@dataclasses.dataclass(frozen=True)
class Way:
    """The kernel's configuration, or None for the library; whether operands are finalised before the kernel."""

    config: Any  # Config, WgradConfig or None
    finalise: bool = False

    def __str__(self) -> str:
        """Leaves out the tile's shape, which depends on the map's."""
        if self.config is None:
            return "library"
        rest = {name: value for name, value in vars(self.config).items() if name not in ("block_d", "block_h", "block_w")}
        shape = f"pixels {self.config.pixels} " + " ".join(f"{name} {value}" for name, value in rest.items())
        return f"finalise, {shape}" if self.finalise else shape


def conv(out: Tensor, a: Tensor, wa: Tensor, **options) -> Tensor | None:
    """See `naive.conv`."""
    if interpreted(out) or out.numel() == 0:
        return fused.conv(out, a, wa, **options)
    way = way_of_conv(out, a, lambda way: conv_by(way, torch.empty_like(out), a, wa, **options), **options)[0]
    return conv_by(way, out, a, wa, **options)


def way_of_conv(out: Tensor, a: Tensor, run: Callable[[Way], object], **options) -> tuple[Way, bool]:
    """The way to run a call of `conv`, measured by `run` inside `tuning.measuring`; and whether it was measured."""
    flags = tuple([name for name in ("phased", "affine_a", "affine_b", "add", "stats", "plain") if options.get(name)])
    geometry = options["axes"], options.get("taps", 3), options.get("stride", 1)
    key, sizes = _key_of_conv(out, a, options.get("b"), geometry, flags, dot_precision(a.dtype))
    way = tuning.choose(key, sizes, lambda: ways_of_conv(out, a, **options), run)
    return way, key in tuning.table


@per_shape
def _key_of_conv(
    out: Tensor, a: Tensor, b: Tensor | None, geometry: tuple[int, int, int], flags: tuple[str, ...], precision: str
) -> tuple[str, tuple[int, ...]]:
    """The key of a call of `conv`, and its batch and sizes. geometry: axes, taps, stride; precision: as it is now."""
    axes, taps, stride = geometry
    sizes = out.shape[0], *unit_grid(out, axes, "phased" in flags)
    channels = (a.shape[-1], 0 if b is None else b.shape[-1], out.shape[-1])
    return tuning.key("conv", a, f"{axes}d taps{taps} stride{stride} {' '.join(flags)}", channels, sizes), sizes


def ways_of_conv(out: Tensor, a: Tensor, **options) -> list[Way]:
    """The ways worth timing for a call of `conv`; the first is the default."""
    phased = options.get("phased", False)
    units = unit_grid(out, options["axes"], phased)
    call = units, out.shape[0], out.shape[-1], options["axes"], phased, a.dtype, shared_memory(a.device)
    normed = options.get("affine_a") is not None or options.get("affine_b") is not None
    ways = [Way(config) for config in configs(*call, normed)]
    if normed:
        ways += [Way(config, finalise=True) for config in configs(*call)]
    return [*ways, Way(None)]


def conv_by(way: Way, out: Tensor, a: Tensor, wa: Tensor, **options) -> Tensor | None:
    """Runs `conv` in the given way."""
    if way.config is None:
        return library.conv(out, a, wa, **options)
    if way.finalise:
        slope = options.get("slope", 0.0)
        a = read(a, options.pop("affine_a", None), slope, options.pop("plain", 0))
        if options.get("b") is not None:
            options["b"] = read(options["b"], options.pop("affine_b", None), slope)
    return fused.conv(out, a, wa, config=way.config, **options)


def conv_wgrad(a: Tensor, dy: Tensor, **options) -> Tensor:
    """See `naive.conv_wgrad`."""
    if interpreted(a) or dy.numel() == 0:
        return fused_wgrad.conv_wgrad(a, dy, **options)
    flags = tuple([name for name in ("phased", "affine", "plain") if options.get(name)])
    key, sizes = _key_of_wgrad(a, dy, options["axes"], flags, dot_precision(a.dtype))
    way = tuning.choose(
        key, sizes, lambda: ways_of_wgrad(a, dy, **options), lambda way: conv_wgrad_by(way, a, dy, **options)
    )
    return conv_wgrad_by(way, a, dy, **options)


@per_shape
def _key_of_wgrad(a: Tensor, dy: Tensor, axes: int, flags: tuple[str, ...], precision: str) -> tuple[str, tuple[int, ...]]:
    """As `_key_of_conv`."""
    sizes = a.shape[0], *unit_grid(dy, axes, "phased" in flags)
    return tuning.key("conv_wgrad", a, f"{axes}d {' '.join(flags)}", (a.shape[-1], dy.shape[-1]), sizes), sizes


def ways_of_wgrad(a: Tensor, dy: Tensor, **options) -> list[Way]:
    """As `ways_of_conv`."""
    axes, phased = options["axes"], options.get("phased", False)
    units = unit_grid(dy, axes, phased)
    ways = [Way(config) for config in fused_wgrad.configs(units, a.shape[-1], dy.shape[-1], axes, phased, a.dtype)]
    if options.get("affine") is not None:
        ways += [dataclasses.replace(way, finalise=True) for way in ways]
    return [*ways, Way(None)]


def conv_wgrad_by(way: Way, a: Tensor, dy: Tensor, **options) -> Tensor:
    """Runs `conv_wgrad` in the given way."""
    if way.config is None:
        return library.conv_wgrad(a, dy, **options)
    if way.finalise:
        a = read(a, options.pop("affine", None), options.get("slope", 0.0), options.pop("plain", 0))
    return fused_wgrad.conv_wgrad(a, dy, config=way.config, **options)


@lru_cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; meta tensors stand for those on the current GPU."""
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda" or torch.version.hip:
        return LEAST_SHARED
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]
