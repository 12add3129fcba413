"""Prediction on images of any size: padding, the accurate and the fast mode, probabilities."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..architecture.input_checks import check_input, leaves_one_value
from ..architecture.network_spec import NetworkSpec
from .normalisation import prepared_tensor
from .own_forward import logits_of_call, own_forward

MODES = ("accurate", "fast")
PROBABILITIES = ("sigmoid", "softmax")


def pad_to_multiple(x: Tensor, multiple: int | Sequence[int]) -> Tensor:
    """`x` `[N, C, *S]` with border pixels repeated at the end of each axis up to the next multiple of a number, or of one
    per axis."""
    multiples = [multiple] * (x.ndim - 2) if isinstance(multiple, int) else multiple
    missing = [-size % step for size, step in zip(x.shape[2:], multiples, strict=True)]
    if not any(missing):
        return x
    padding = [amount for size in reversed(missing) for amount in (0, size)]
    return F.pad(x, padding, mode="replicate")


def crop(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """The leading `size` of the spatial axes of `x`."""
    where: Any = (..., *(slice(0, axis) for axis in size))
    return x[where]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
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

    run: replaces `network.logits`; by default a network with hooks or its own `forward` is called.
    """
    multiples = network.multiples
    padded = pad_to_multiple(x, multiples)
    if leaves_one_value(network, padded):  # instance norm has no statistics of one pixel: give it two
        padded = F.pad(padded, (0, multiples[-1]) + (0, 0) * (x.ndim - 3), mode="replicate")
    run = run or ((lambda image: logits_of_call(network, image)) if own_forward(network) else network.logits)
    return [crop(logits, x.shape[2:]) for logits in run(padded)]


def activation_of(network: NetworkSpec, asked: str | None) -> str:
    """The activation of a prediction: what is asked for, else that of the classes that the network was trained on."""
    return asked or ("softmax" if network.exclusive else "sigmoid")


def check_image(network: NetworkSpec, x: Tensor, activation: str) -> None:
    """Raises one clear error unless `x`, of any size, is an image without NaN to predict from and `activation` is known."""
    if activation not in PROBABILITIES:
        raise ValueError(f"activation must be one of {PROBABILITIES}, not {activation!r}")
    check_input(network, x, any_size=True)
    if not torch.isfinite(x).all():
        raise ValueError("the image contains NaN or infinite values: replace them first, e.g. x.nan_to_num()")


def over_flips(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The mean of `run` `[N, C, *S]` over the image and all its mirror images, each turned back: 4 of an image, 8 of a
    volume."""
    axes = range(2, x.ndim)
    flips = [chosen for count in range(len(axes) + 1) for chosen in itertools.combinations(axes, count)]
    total = None
    for chosen in flips:
        result = run(x.flip(chosen)).flip(chosen) if chosen else run(x)
        total = result if total is None else total + result
    return total / len(flips)


def predict(
    network: NetworkSpec, x: Tensor, mode: str, level: int | None, activation: str | None, flips: bool = False
) -> Tensor:
    """See `Network.predict`."""
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, not {mode!r}")
    activation, x = activation_of(network, activation), prepared_tensor(network, x)
    check_image(network, x, activation)
    if flips:
        return over_flips(lambda image: predict(network, image, mode, level, activation), x)
    heads = network.topology.heads
    level = heads[-1] if level is None else level
    if "forward" in network.__dict__:  # of this instance alone: it computes all heads
        with evaluating(network):
            logits = logits_of_any_size(network, x)
        kept = network.topology.pruned(level, keep_heads=mode == "accurate").heads
        return mean_probabilities([one for column, one in zip(heads, logits, strict=True) if column in kept], activation)
    part = network.part(level, keep_heads=mode == "accurate")
    with evaluating(part):
        return mean_probabilities(logits_of_any_size(part, x), activation)


def small_image(network: NetworkSpec, multiple: int) -> Tensor:
    """`[1, C, multiple, .., 2 * multiple]` of values in [-1, 1], on the network's device, in its precision."""
    weight, topology = next(network.parameters()), network.topology
    size = [multiple] * (topology.spatial_dims - 1) + [2 * multiple]  # two pixels at the lowest level
    count = topology.in_channels * math.prod(size)
    image = (37 * torch.linspace(-1, 1, count, dtype=torch.float64)).sin()
    return image.reshape(1, topology.in_channels, *size).to(weight)


def mean_probabilities(outputs: list[Tensor], activation: str = "sigmoid") -> Tensor:
    """The mean over the heads of the probabilities of `[N, out_channels, *S]` logits, at least in float32."""
    wide = [logits if logits.dtype.itemsize >= 4 else logits.float() for logits in outputs]
    probabilities = [logits.sigmoid() if activation == "sigmoid" else logits.softmax(dim=1) for logits in wide]
    return torch.stack(probabilities).mean(dim=0)
