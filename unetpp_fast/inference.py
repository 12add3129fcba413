"""Prediction on images of any size: padding, the accurate and the fast mode, probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checks import check_input, leaves_one_value

if TYPE_CHECKING:
    from .models import Network

MODES = ("accurate", "fast")
ACTIVATIONS = ("sigmoid", "softmax")


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """`x` `[N, C, *S]` with border pixels repeated at the end of each axis up to the next multiple."""
    missing = [-size % multiple for size in x.shape[2:]]
    if not any(missing):
        return x
    padding = [amount for size in reversed(missing) for amount in (0, size)]
    return F.pad(x, padding, mode="replicate")


def crop(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The leading `size` of the spatial axes of `x`."""
    return x[(..., *(slice(0, axis) for axis in size))]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; afterwards every module has the mode it had, frozen ones included."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def outputs_of_any_size(network: Network, x: Tensor, run: Callable[[Tensor], list[Tensor]] | None = None) -> list[Tensor]:
    """Logits `[N, out_channels, *S]` of each head for any size: padded to what the network needs, cropped back.

    run: computes them in place of the network itself.
    """
    check_input(network, x, any_size=True)
    multiple = network.topology.multiple
    padded = pad_to_multiple(x, multiple)
    if leaves_one_value(network, padded):  # instance norm has no statistics of one pixel: give it two
        padded = F.pad(padded, (0, multiple) + (0, 0) * (x.ndim - 3), mode="replicate")
    outputs = (run or network)(padded)
    return [crop(logits, x.shape[2:]) for logits in (outputs if isinstance(outputs, list) else [outputs])]


def predict(network: Network, x: Tensor, mode: str, level: int | None, activation: str) -> Tensor:
    """See `Network.predict`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, not {activation!r}")
    check_input(network, x, any_size=True)
    if not torch.isfinite(x).all():
        raise ValueError("the image holds NaN or infinite values: mend it first, e.g. x.nan_to_num()")
    level = network.topology.heads[-1] if level is None else level
    part = network.subnetwork(network.topology.pruned(level, keep_heads=mode == "accurate"), deep_supervision=True)
    with evaluating(part):
        return mean_probabilities(outputs_of_any_size(part, x), activation)


def mean_probabilities(outputs: list[Tensor], activation: str = "sigmoid") -> Tensor:
    """The mean over the heads of the probabilities of `[N, out_channels, *S]` logits, in float32 at least."""
    wide = [logits if logits.dtype.itemsize >= 4 else logits.float() for logits in outputs]
    each = [logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=1) for logits in wide]
    return torch.stack(each).mean(dim=0)
