"""Encoders of other libraries: timm's by name, or any module that returns a pyramid of maps, and their weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.topology import MAX_DEPTH
from ..common.errors import InputError, first_line
from ..common.extras import need
from .encoder_parts import Encoder, maps_of, truncated
from .prediction import evaluating

IMAGENET = "imagenet"  # the weights that timm has for a name
WRAPPED = ("state_dict", "model")  # keys under which files keep a state_dict
PREFIXES = ("module.", "encoder.", "backbone.", "model.", "body.")


def make_encoder(
    encoder: str | nn.Module,
    *,
    in_channels: int,
    spatial_dims: int = 2,
    depth: int = 5,
    weights: str | os.PathLike | None = None,
) -> tuple[Encoder, tuple[int, ...]]:
    """An encoder of `depth` maps, and their channels, finest first; 0 for the first of an encoder that begins at 1/4.

    Args:
        encoder: a name in `timm.list_models()`, or a module that maps `[N, in_channels, *S]` to a list, tuple or dictionary
            of maps; there must be one at each of 1/2, 1/4, ... 1/2^depth of the size, that at 1/2 may be missing, others are
            not used. The module is not copied; what none of these maps needs does not become a part of the network.
        weights: "imagenet" (those that timm has), a file with a state_dict (.pth or .safetensors; of a whole classifier
            too), or None.

    Raises:
        InputError: a ValueError; timm is missing or does not know the name, weights cannot be had or do not fit, or the
            encoder does not give these maps.
    """
    if not isinstance(depth, int) or isinstance(depth, bool) or not 2 <= depth <= MAX_DEPTH + 1:
        raise InputError(f"encoder_depth must be an integer from 2 to {MAX_DEPTH + 1}, not {depth!r}")
    name = encoder if isinstance(encoder, str) else None
    if name is not None and spatial_dims != 2:
        raise InputError("timm's encoders are 2D: with spatial_dims=3, give a module as the encoder")
    if name is None and not isinstance(encoder, nn.Module):
        raise InputError(f"encoder must be a name of timm or a module, not {type(encoder).__name__}")
    if name is None and weights == IMAGENET:
        raise InputError("encoder_weights='imagenet' is for names of timm: a module has its weights, or give a file")
    body: Any = encoder if name is None else _from_timm(name, in_channels, depth, weights == IMAGENET)
    x = _sample(body, in_channels, spatial_dims, depth)
    places, widths = _pyramid(body, x, depth)
    if weights is not None and weights != IMAGENET:
        load_weights(body, weights)
    return truncated(Encoder(body, places, name), depth, x), widths


def _from_timm(name: str, in_channels: int, depth: int, pretrained: bool) -> nn.Module:
    timm = need("timm", "encoders")
    if not timm.is_model(name.partition(".")[0]):
        near = difflib.get_close_matches(name.replace("-", "_"), timm.list_models(), n=3)
        known = f"did you mean {' or '.join(map(repr, near))}?" if near else "timm.list_models() names them"
        raise InputError(f"timm has no model {name!r}: {known}")
    make = partial(timm.create_model, name, features_only=True, in_chans=in_channels)

    def with_maps(count: int) -> tuple[nn.Module | None, Exception | None]:
        try:
            return make(pretrained=False, out_indices=tuple(range(count))), None
        except Exception as error:  # timm raises many kinds
            return None, error

    body, failed = with_maps(depth)
    if body is None:  # some, such as convnext, have no map at 1/2
        body, _ = with_maps(depth - 1)
    elif max(body.feature_info.reduction()) < 2**depth:  # and some, such as vgg, one of the image's size before it
        body = with_maps(depth + 1)[0] or body
    if body is None:
        why = f"{type(failed).__name__}: {first_line(failed)}"
        raise InputError(f"timm gives no {depth} maps of {name!r} ({why}): choose another encoder_depth") from failed
    if not pretrained:
        return body
    try:
        return make(pretrained=True, out_indices=tuple(range(len(body.feature_info.reduction()))))
    except Exception as error:  # and the hub many more
        how = "give a file, encoder_weights='weights.pth', or None"
        raise InputError(f"the ImageNet weights of {name!r} cannot be had ({first_line(error)}): {how}") from error


def _sample(body: nn.Module, in_channels: int, spatial_dims: int, depth: int) -> Tensor:
    """A small image, of noise, as the encoder takes it."""
    side = 2 ** (depth + (spatial_dims == 2))
    x = torch.randn(1, in_channels, *[side] * spatial_dims, generator=torch.Generator().manual_seed(0))
    like = next(body.parameters(), None)
    return x if like is None else x.to(like)


def _pyramid(body: nn.Module, x: Tensor, depth: int) -> tuple[tuple[int | None, ...], tuple[int, ...]]:
    """Which of an encoder's maps are at 1/2, ... 1/2^depth of the size of `x`, and their channels; None and 0 where there is
    none at 1/2."""
    try:
        with evaluating(body):
            maps = maps_of(body, x)
    except Exception as error:  # whatever another library's module does
        shape = tuple(x.shape)
        raise InputError(
            f"the encoder does not take an image of shape {shape}: {type(error).__name__}: {first_line(error)}"
        ) from error
    if not maps or any(not isinstance(one, Tensor) or one.ndim != x.ndim for one in maps):
        raise InputError(f"the encoder must return a list of maps with {x.ndim} axes, [N, C, *S], one per size")
    sizes = [tuple(one.shape[2:]) for one in maps]
    wanted = [tuple(side >> level for side in x.shape[2:]) for level in range(1, depth + 1)]
    missing = [level for level, size in enumerate(wanted, start=1) if size not in sizes]
    if missing and missing != [1]:
        shapes = ", ".join("x".join(map(str, size)) for size in sizes)
        shorter = f"encoder_depth={missing[0] - 1}, or choose" if missing[0] > 2 else "choose"
        raise InputError(
            f"of an image of {'x'.join(map(str, x.shape[2:]))} pixels the encoder gives maps of {shapes}: there is none at"
            f" 1/{2 ** missing[0]} of the size; set {shorter} an encoder that halves the size from map to map"
        )
    # the last, deepest one of each size
    places = [len(sizes) - 1 - sizes[::-1].index(size) if size in sizes else None for size in wanted]
    return tuple(places), tuple(0 if place is None else maps[place].shape[1] for place in places)


@torch.no_grad()
def load_weights(body: nn.Module, path: str | os.PathLike) -> None:
    """Loads the weights of an encoder from a file with a state_dict, of which it needs not all; no code in it can run.

    Names may have a prefix such as "encoder.", and underscores for dots, as timm makes of some names. Filters over three
    channels are summed for an encoder that takes one.

    Raises:
        InputError: the file cannot be read, or it lacks a weight, or one has another shape.
    """
    found = _by_plain_names(_read(Path(path)))
    state = {}
    for name, own in body.state_dict().items():
        value = found.get(_plain(name))
        if value is None and name.endswith("num_batches_tracked"):
            value = own
        if value is None:
            raise InputError(f"{path} has no {name!r}: it holds the weights of another encoder")
        if own.ndim >= 4 and own.shape[1] == 1 and value.ndim == own.ndim and value.shape[1] == 3:
            value = value.sum(dim=1, keepdim=True)
        if value.shape != own.shape:
            raise InputError(f"{path} has {name!r} of shape {tuple(value.shape)}, the encoder needs {tuple(own.shape)}")
        state[name] = value
    body.load_state_dict(state)


def _read(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: encoder_weights is 'imagenet', a file or None")
    try:
        if path.suffix == ".safetensors":
            state = need("safetensors.torch", "encoders").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file can make the reader fail in any way
        raise InputError(f"{path} cannot be read as a state_dict: {first_line(error)}") from error
    for key in WRAPPED:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping):
        raise InputError(f"{path} holds no state_dict but a {type(state).__name__}")
    return state


def _by_plain_names(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file by their plain names; a prefix that they share, or that only an encoder's have, is dropped."""
    named = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    again = True
    while again:
        again = False
        for prefix in PREFIXES:
            inner = {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}
            if inner and (prefix == "encoder." or len(inner) == len(named)):
                named, again = inner, True
    return {_plain(name): value for name, value in named.items()}


def _plain(name: str) -> str:
    """timm flattens some sequences of layers: `features.0.weight` is then called `features_0.weight`."""
    return name.replace("_", ".")
