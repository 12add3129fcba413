"""Checks of a network's input; each failure is one clear error."""

from __future__ import annotations

import torch
from torch import Tensor

from .network_spec import NetworkSpec
from .options import norm_name


def check_input(network: NetworkSpec, x: Tensor, any_size: bool = False) -> None:
    """Raises one clear error if `network` does not take `x`; with `any_size` every size is accepted."""
    topology = network.topology
    dims, multiples = topology.spatial_dims, topology.multiples
    axes = "N, C, H, W" if dims == 2 else "N, C, D, H, W"
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        how = "x.float(), scaled as in training" if isinstance(x, Tensor) else "torch.as_tensor(x).float()"
        raise TypeError(f"expected a floating-point tensor [{axes}], got {kind}: convert it, e.g. with {how}")
    weight = next(network.parameters(), None)  # a replica of nn.DataParallel has none
    if weight is not None and weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"the input is {x.dtype} but the model is {weight.dtype}: use x.to({weight.dtype}) or torch.autocast"
        )
    if x.ndim != dims + 2:
        raise ValueError(f"expected {dims + 2} axes [{axes}], got {x.ndim}: shape {tuple(x.shape)}{_about_axes(x, dims)}")
    if x.shape[1] != topology.in_channels:
        raise ValueError(
            f"expected {topology.in_channels} channels, got {x.shape[1]}: shape {tuple(x.shape)}, axes [{axes}]"
        )
    if any_size and 0 in x.shape[2:]:
        raise ValueError(f"the image is empty: expected pixels on every axis, got shape {tuple(x.shape)}, axes [{axes}]")
    for size, multiple in zip(x.shape[2:], multiples, strict=True):
        if size == 0 or (size % multiple and not any_size):
            what = f"{multiple} (2^depth)" if len(set(multiples)) == 1 else f"its number of {multiples}"
            raise ValueError(
                f"size {'x'.join(map(str, x.shape[2:]))} does not fit: every axis must be a positive multiple of {what};"
                " predict() pads and crops any size"
            )
    if not any_size and leaves_one_value(network, x):
        norm = norm_name(network.options["norm"])
        raise ValueError(
            f"{norm} norm needs more than one value per channel at the lowest level, where shape {tuple(x.shape)} leaves one"
            f" pixel: use a larger size" + (", a larger batch" if norm == "batch" else "") + " or fewer levels"
        )


def _about_axes(x: Tensor, dims: int) -> str:
    """What to do about an `x` of the wrong number of axes, where that is plain."""
    if x.ndim == dims + 1:
        return "; add the missing one: x[None] for the batch, x[:, None] for a single channel"
    if {x.ndim, dims + 2} == {4, 5}:
        return f"; this network is {dims}D, for {x.ndim - 2}D images build one with spatial_dims={x.ndim - 2}"
    return ""


def leaves_one_value(network: NetworkSpec, x: Tensor) -> bool:
    """Whether each statistic of the lowest level is over a single value: normalised, its maps would be zero everywhere."""
    name = norm_name(network.options["norm"])
    synced = getattr(network, "sync_group", "")  # then the other processes have values too
    if name in (None, "group") or (name == "batch" and (synced or not network.training)):
        return False
    values = x.shape[0] if name == "batch" else 1
    for size, multiple in zip(x.shape[2:], network.topology.multiples, strict=True):
        values = values * (size // multiple)
    return values == 1
