"""The part of an encoder that gives its finest maps: found by gradients, checked by comparison, on the same modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..common.errors import first_line
from .prediction import evaluating


class Encoder(nn.Module):
    """An encoder as `EncodedNetwork` takes it: `[N, C, *S]` to the image and its maps at 1/2, 1/4, ... of the size; of one
    that begins at 1/4 the first has no channels.

    Attributes:
        body: the module, of another library; it returns a list, a tuple or a dictionary of maps.
        places: which of its maps are given, finest first; None for the first of an encoder that begins at 1/4.
        name: of timm, None for a module of any other kind.
        remark: why a part of an encoder computes more than its maps need; "" if it does not.
    """

    def __init__(self, body: nn.Module, places: tuple[int | None, ...], name: str | None = None, remark: str = ""):
        super().__init__()
        self.body, self.places, self.name, self.remark = body, places, name, remark

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = maps_of(self.body, x)
        halved = x.new_empty(x.shape[0], 0, *(side // 2 for side in x.shape[2:])) if self.places[0] is None else None
        return [x, *(halved if place is None else maps[place] for place in self.places)]

    def extra_repr(self) -> str:
        return f"{self.name or type(self.body).__name__}, maps {list(self.places)}"


class Skipped(nn.Module):
    """In place of a module whose result no map needs: passes its input on."""

    def forward(self, x: Tensor, *others, **options) -> Tensor:
        return x


def maps_of(body: nn.Module, x: Tensor) -> list[Tensor]:
    """What an encoder returns, as a list."""
    maps = body(x)
    return list(maps.values() if isinstance(maps, Mapping) else maps) if not isinstance(maps, Tensor) else [maps]


def truncated(encoder: nn.Module, depth: int, x: Tensor) -> Encoder:
    """The first `depth` maps of an encoder, on the same modules and parameters, without the layers that none of them needs.

    Which these are is found by the gradients of the maps; a layer whose absence would change a map, as seen on the image
    `x`, stays. An encoder of which that cannot be found out runs as a whole, and `Encoder.remark` says why.

    Args:
        encoder: an `Encoder`, or a module that returns the image and then the maps.
    """
    whole = encoder if isinstance(encoder, Encoder) else Encoder(encoder, tuple(range(1, depth + 1)))
    body, places = whole.body, whole.places[:depth]
    result = Encoder(body, places, whole.name)
    places = tuple(place for place in places if place is not None)
    result.training = encoder.training
    try:
        with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
            unneeded = list(_unneeded(body, _needed(body, places, x)))
            expected = _maps(body, places, x)
            part = _without(body, set(unneeded))
            if not _equal(_maps(part, places, x), expected):
                raise RuntimeError("its maps would change")
            for pool in _pools(part, x):  # smaller maps than are needed would have no pixels left to pool
                shorter = _without(part, {pool})
                if _equal(_maps(shorter, places, x), expected):
                    part = shorter
    except Exception as error:  # whatever another library's module does, it runs as it is
        result.remark = f"the encoder is not cut, it runs as a whole: {type(error).__name__}: {first_line(error)}"
        return result
    result.body = part
    return result


def _maps(body: nn.Module, places: tuple[int, ...], x: Tensor) -> list[Tensor]:
    with evaluating(body):
        maps = maps_of(body, x)
        return [maps[place] for place in places]


def _equal(maps: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, maps, others))


def _needed(body: nn.Module, places: tuple[int, ...], x: Tensor) -> set[str]:
    """Names of the parameters that these maps depend on."""
    own = copy.deepcopy(body).eval().requires_grad_(True)
    with torch.enable_grad():
        maps = maps_of(own, x)
        total = torch.stack([maps[place].sum() for place in places]).sum()
        named = dict(own.named_parameters())
        found = torch.autograd.grad(total, list(named.values()), allow_unused=True) if named else ()
    return {name for name, gradient in zip(named, found, strict=True) if gradient is not None}


def _unneeded(module: nn.Module, needed: set[str], prefix: str = "") -> Iterator[str]:
    """Names of the largest modules with parameters, none of which are needed; a mere list of modules is never called."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        mine = [key for key, _ in child.named_parameters(path)]
        called = type(child).forward is not nn.Module.forward
        if called and mine and not needed.intersection(mine):
            yield path
        elif mine:
            yield from _unneeded(child, needed, f"{path}.")


def _pools(body: nn.Module, x: Tensor) -> list[str]:
    """Names of the modules without parameters that make maps smaller, last called first."""
    found: list[str] = []
    hooks = []
    for name, module in body.named_modules():
        if name and not isinstance(module, Skipped) and not any(True for _ in module.parameters()):

            def note(module: nn.Module, inputs: tuple, output: Tensor, name: str = name) -> None:
                if isinstance(output, Tensor) and inputs and output.shape[2:] != inputs[0].shape[2:]:
                    found.append(name)

            hooks.append(module.register_forward_hook(note))
    try:
        with evaluating(body):
            body(x)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(reversed(found)))


def _without(module: nn.Module, names: set[str], prefix: str = "") -> nn.Module:
    """The module with `Skipped` in place of the modules of these names: a copy of the modules around them that shares all
    others; the module itself if there are none."""
    changed: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        path = f"{prefix}{name}"
        if path in names:
            changed[name] = Skipped()
        elif child is not None and any(other.startswith(f"{path}.") for other in names):
            changed[name] = _without(child, names, f"{path}.")
    if not changed:
        return module
    part = copy.copy(module)
    part._modules = {**module._modules, **changed}
    return part
