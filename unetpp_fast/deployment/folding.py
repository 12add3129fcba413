"""Batch norms folded into the convolutions before them, as they compute in eval mode."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.options import norm_name
from ..architecture.precision import without_tf32
from ..execution.built import changed
from ..execution.plan import weight_composition

CONVOLUTIONS, NORMS = (nn.Conv2d, nn.Conv3d), (nn.BatchNorm2d, nn.BatchNorm3d)
CLOSE = 1e-3  # of the largest value: the difference that folding may make to an encoder's maps in float32


@torch.no_grad()
def fold(conv: nn.Module, norm: nn.Module) -> None:
    """Changes `conv` into what `norm(conv(x))` computes in eval mode; composed in float64."""
    bias = None if conv.bias is None else conv.bias.double()
    parts = tuple(part.double() for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var))
    values = weight_composition.fold(conv.weight.double(), bias, parts, norm.eps)
    conv.weight, conv.bias = (nn.Parameter(value.to(conv.weight.dtype), requires_grad=False) for value in values)


def folded(network: Any) -> Any:
    """A copy of the network with its batch norms folded, for the reference; the network itself if it has none, or if its
    layers were changed."""
    if norm_name(network.options["norm"]) != "batch" or changed(network):
        return network
    result = copy.deepcopy(network).requires_grad_(False).eval()
    for node in result.nodes.values():
        for place in ("1", "2"):
            fold(getattr(node, f"conv{place}"), getattr(node, f"norm{place}"))
            setattr(node, f"norm{place}", nn.Identity())
    return result


def folded_encoder(encoder: nn.Module, x: Tensor) -> tuple[nn.Module, str]:
    """An encoder in eval mode with its batch norms folded, and how many were, in words; itself if its maps of `x` change.

    The graph that autograd records of a pass shows which convolution each norm reads, and that nothing else reads it.
    """
    every = sum(isinstance(module, NORMS) for module in encoder.modules())
    try:
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            result = copy.deepcopy(encoder)
            pairs = list(_pairs(result, x))
            for conv, norm in pairs:
                fold(conv, norm)
                _replace(result, norm, nn.Identity())
            same = _same_maps(encoder, result, x)
    except Exception as error:  # whatever another library's module does, it runs as it is
        return encoder, f"its {every} batch norms are not folded: {type(error).__name__}: {error}"
    if not same:
        return encoder, f"its {every} batch norms are not folded: its maps would change"
    return result, f"{len(pairs)} of its {every} batch norms are folded"


class Recorded:
    """The graph that autograd records of a pass of an encoder, from its maps back to the image `x`.

    Attributes:
        nodes: every node, once. readers, runs: how often a node's result is read, and how often a module runs.
    """

    def __init__(self, encoder: nn.Module, x: Tensor):
        self._owners = {
            parameter: module
            for module in encoder.modules()
            for parameter in module._parameters.values()
            if parameter is not None
        }
        encoder.requires_grad_(True)
        with torch.enable_grad():
            maps = encoder(x)
        encoder.requires_grad_(False)
        roots = [one.grad_fn for one in maps if one.grad_fn is not None]
        self.nodes = list(_nodes(roots))
        self.readers = Counter([*roots, *(before for node in self.nodes for before, _ in node.next_functions)])
        self.runs = Counter(self.owner(node) for node in self.nodes)

    def owner(self, node: object) -> nn.Module | None:
        """The module whose weight a node of a convolution or norm takes."""
        functions: Any = getattr(node, "next_functions", ())
        return self._owners.get(getattr(functions[1][0], "variable", None)) if len(functions) > 1 else None

    def convolution_before(self, node: Any) -> nn.Module | None:
        """The convolution whose result a node takes first, if it runs once and nothing else reads that."""
        before = node.next_functions[0][0] if node.next_functions else None
        conv = self.owner(before)
        single = isinstance(conv, CONVOLUTIONS) and self.readers[before] == self.runs[conv] == 1
        return conv if single else None


def _pairs(encoder: nn.Module, x: Tensor) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Each convolution whose result only one batch norm reads, and that norm; each of them runs once."""
    recorded = Recorded(encoder, x)
    for node in recorded.nodes:
        norm = recorded.owner(node)
        if type(norm) not in NORMS or recorded.runs[norm] != 1:
            continue
        conv = recorded.convolution_before(node)
        if conv is not None and norm.track_running_stats and not norm._forward_hooks:
            yield conv, norm


def _nodes(roots: Iterable) -> Iterator:
    """Every node of a graph of autograd, once."""
    seen, waiting = set(), list(roots)
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
            yield node


def _replace(whole: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in whole.modules():
        for name, child in parent.named_children():
            if child is old:
                setattr(parent, name, new)


@torch.no_grad()
def _same_maps(encoder: nn.Module, other: nn.Module, x: Tensor) -> bool:
    """Compared without TF32, whose rounding would look like a difference."""
    with without_tf32():
        return are_close(encoder(x), other(x))


def are_close(maps: Iterable[Tensor], others: Iterable[Tensor], bound: float = CLOSE) -> bool:
    """Whether the maps of two passes differ by at most `bound` of the largest value of each."""
    return all((a - b).abs().max() <= bound * a.abs().max() for a, b in zip(maps, others, strict=True))
