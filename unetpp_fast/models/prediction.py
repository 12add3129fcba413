"""Prediction on images of any size: padding, the accurate and the fast mode, probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..architecture.input_checks import check_input, leaves_one_value
from ..architecture.network_spec import NetworkSpec

MODES = ("accurate", "fast")
PROBABILITIES = ("sigmoid", "softmax")


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
    """Eval mode and no gradients inside; afterwards every module has its previous mode."""
    modes = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in modes):
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def logits_of_any_size(network: NetworkSpec, x: Tensor, run: Callable[[Tensor], list[Tensor]] | None = None) -> list[Tensor]:
    """Logits `[N, out_channels, *S]` of each head for an `x` of any size that `check_input` accepts; padded and cropped.

    run: replaces `network.logits`.
    """
    multiple = network.multiple
    padded = pad_to_multiple(x, multiple)
    if leaves_one_value(network, padded):  # instance norm has no statistics of one pixel: give it two
        padded = F.pad(padded, (0, multiple) + (0, 0) * (x.ndim - 3), mode="replicate")
    return [crop(logits, x.shape[2:]) for logits in (run or network.logits)(padded)]


def check_image(network: NetworkSpec, x: Tensor, activation: str) -> None:
    """Raises one clear error unless `x`, of any size, is an image without NaN to predict from and `activation` is known."""
    if activation not in PROBABILITIES:
        raise ValueError(f"activation must be one of {PROBABILITIES}, not {activation!r}")
    check_input(network, x, any_size=True)
    if not torch.isfinite(x).all():
        raise ValueError("the image contains NaN or infinite values: replace them first, e.g. x.nan_to_num()")


def predict(network: NetworkSpec, x: Tensor, mode: str, level: int | None, activation: str) -> Tensor:
    """See `Network.predict`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    check_image(network, x, activation)
    part = network.part(network.topology.heads[-1] if level is None else level, keep_heads=mode == "accurate")
    with evaluating(part):
        return mean_probabilities(logits_of_any_size(part, x), activation)


def mean_probabilities(outputs: list[Tensor], activation: str = "sigmoid") -> Tensor:
    """The mean over the heads of the probabilities of `[N, out_channels, *S]` logits, at least in float32."""
    wide = [logits if logits.dtype.itemsize >= 4 else logits.float() for logits in outputs]
    probabilities = [logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=1) for logits in wide]
    return torch.stack(probabilities).mean(dim=0)
