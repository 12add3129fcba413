"""What a call of a network computes beside the forward pass of this package, and the logits of such a call.

Subclasses may override `forward` (to normalise the image, say), and hooks on the network run when it is called. Then its
logits are those that the call works with.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..execution.built import HOOKS

AnyNetwork = TypeVar("AnyNetwork", bound=nn.Module)
FINALS: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, torch.sigmoid, lambda x: x.softmax(dim=1))


def own_forward(network: Any) -> str:
    """Why calling `network` is more than the forward pass of this package; "" if it is not."""
    kind: Any = type(network)
    for name, method in kind.package_methods.items():
        if name in network.__dict__ or getattr(kind, name) is not method:
            where = "this instance" if name in network.__dict__ else f"the class {kind.__name__}"
            return f"{where} has a {name} of its own"
    if _has_any_global_hook():
        return "there are hooks for all modules"
    return "the network has hooks" if any(network.__dict__[name] for name in HOOKS) else ""


def logits_of_call(network: Any, x: Tensor) -> list[Tensor]:
    """Logits `[N, out_channels, *S]` of each head from a call of the network as it is, hooks and its own `forward` included.

    What `forward` makes of an image before the pass counts. What it makes of the logits counts too, but for a sigmoid or
    softmax, because probabilities are taken of these logits.

    Raises:
        ValueError: the call returns neither logits nor their probabilities.
    """
    passes: list[list[Tensor]] = []
    listener = object.__new__(type(network))
    listener.__dict__.update(network.__dict__)

    def logits(image: Tensor) -> Tensor | list[Tensor]:
        found = network.logits(image)
        passes.append(_listed(found))
        return found

    listener.__dict__["logits"] = logits
    outputs = listener(x)
    given = _listed(outputs)
    if not all(isinstance(one, Tensor) for one in given):
        raise ValueError(f"a call of this {type(network).__name__} returns a {type(outputs).__name__}, not logits")
    if passes:
        shaped = _listed(network.shaped(passes[-1]))
        if any(_equal(given, [final(one) for one in shaped]) for final in FINALS):
            return passes[-1]
    if network.form == "deepest_first":
        given = given[::-1]
    heads = len(network.topology.heads)
    shape = (x.shape[0], network.out_channels, *x.shape[2:])
    if len(given) != heads or any(one.shape != shape for one in given):
        shapes = [tuple(one.shape) for one in given]
        raise ValueError(f"a call of this {type(network).__name__} returns {shapes}, not {heads} map(s) of logits {shape}")
    if all(one.numel() and one.min() >= 0 and one.max() <= 1 for one in given):
        raise ValueError(
            f"a call of this {type(network).__name__} returns values in [0, 1], as probabilities are: predict needs logits;"
            " call the model itself"
        )
    return given


def sharing(network: AnyNetwork) -> AnyNetwork:
    """Another object with the same modules: of the same class, with all attributes and hooks, which may then change in one
    of the two."""
    other = object.__new__(type(network))
    other.__dict__.update(network.__dict__)
    for name, value in network.__dict__.items():
        if name.endswith("_hooks"):
            other.__dict__[name] = copy.copy(value)
    other._modules = dict(network._modules)
    return other


def check_prunable(network: nn.Module) -> None:
    """Raises ValueError where `forward` was replaced on this instance, so that no part of the network can have it."""
    if "forward" in network.__dict__:
        raise ValueError("forward was replaced on this instance, for all of its heads: make it a method of a subclass")


def _listed(outputs: object) -> list:
    return list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        one.shape == other.shape and torch.equal(one, other) for one, other in zip(some, others, strict=True)
    )
