"""Prediction of images and volumes too large for one pass: overlapping tiles, blended, in a fixed amount of memory.

Tiles start at multiples of 2^depth, aligned with the pooling windows, and beyond the image they see the padding of
`predict`. So the result differs from one pass over the whole image only near the edges of a tile; further inside than the
receptive field it is the same. (Instance norm takes statistics of the whole tile.)
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.wrappers import network_of as network_of_module
from ..architecture.wrappers import unwrapped
from ..common.extras import need
from .ensemble import Ensemble
from .normalisation import prepared

BLENDS = ("gaussian", "constant")
SIGMA = 1 / 8  # of a tile, as in MONAI's sliding_window_inference and nnU-Net
SMALLEST_TILE = 2  # times 2^depth: a smaller tile has next to no context
HEAP = 2  # on a CPU the reference's peaks were up to 1.7 times the count
RESERVE = 2**24  # bytes on a CPU for code and tables that libraries create for each new shape
UNFOLDED = 20480  # elements of [C, D, H] up to which PyTorch unfolds a 3D convolution's input on a CPU
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
Axis = list[tuple[slice, Tensor]]  # position and weights of each tile along an axis


@torch.no_grad()
def predict_tiled(
    model: nn.Module,
    image: Any,
    *,
    tile: int | Sequence[int] | None = None,
    overlap: float | Sequence[float] = 0.25,
    blend: str = "gaussian",
    max_memory: int | str = "2G",
    out: Any = None,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Probabilities `[N, out_channels, *S]` of an image or volume of any size, predicted tile by tile.

    Only one band of tiles is held in float32: `image` and `out` may be memory-mapped files larger than the memory.

    Args:
        model: a network, or the result of `convert` or `optimize`.
        image: `[N, in_channels, *S]`: a tensor, a numpy array or memmap, or anything with a `shape` that returns arrays
            for slices (zarr, h5py). Floating-point values are converted to the model's precision and not changed; whole
            numbers are prepared as in training (`normalisation`), with statistics taken band by band.
        tile: size in pixels, for all axes or one per axis, multiples of 2^depth; default the largest within `max_memory`.
        overlap: the least share of a tile, at least 0 and below 1, that its neighbour covers too, for all axes or one per
            axis; the step is rounded down to a multiple of 2^depth.
        blend: "gaussian" (weights fall off from the centre of a tile, sigma 1/8 of its size) or "constant". The weights of
            a pixel add up to 1.
        max_memory: bytes, or a text such as "512M", for the maps of a tile and for the band of results; the program, the
            weights, `image` and `out` are not counted. Ignored if `tile` is given.
        out: array, memmap or tensor `[N, out_channels, *S]`, floating point, to write the probabilities into.
        progress: show a progress bar.
        **options: for `model.predict`: mode, level, activation, flips.

    Returns:
        `out`, or a new tensor on the CPU, in float32 (float64 for a model in float64).

    Raises:
        TypeError, ValueError: an argument does not fit, the image contains NaN, it holds whole numbers but the network
            carries no normalisation, or `max_memory` is too small for any tile.
    """
    model = unwrapped(model)
    if not hasattr(model, "predict"):
        network_of_module(model, "predict_tiled")  # says what to give
    shape = tuple(image.shape)
    network = network_of(model)
    check_input(network, torch.empty(shape, dtype=_sample(model).dtype, device="meta"), any_size=True)
    image = prepared(network, image)
    if tile is None:
        tile = choose_tile(model, shape[2:], max_memory, options)
    grid = make_grid(model, shape[2:], tile, overlap, blend)
    wanted = (shape[0], network.out_channels, *shape[2:])
    if out is None:
        out = torch.empty(wanted, dtype=torch.promote_types(_sample(model).dtype, torch.float32))
    elif tuple(out.shape) != wanted:
        raise ValueError(f"out must have the shape {wanted}, not {tuple(out.shape)}")
    elif not str(out.dtype).removeprefix("torch.").startswith(("float", "bfloat")):
        raise TypeError(f"out must be of a floating-point type to hold probabilities, not {out.dtype}")
    for index, first, band in bands(model, image, grid, progress=progress, **options):
        rows = slice(first, first + band.shape[1])
        out[index, :, rows] = band if isinstance(out, Tensor) else band.numpy()  # type: ignore[assignment]
    return out


def bands(
    model: nn.Module,
    image: Any,
    grid: Sequence[Axis],
    *,
    run: Callable[[Tensor], Tensor] | None = None,
    channels: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Iterator[tuple[int, int, Tensor]]:
    """Finished rows of the probabilities of `image` `[N, in_channels, *S]` over a grid of `make_grid`, in order.

    Args:
        run: blended in place of the probabilities: a tile `[1, in_channels, *tile]` to `[1, channels, *tile]`.
        channels: of `run`; default out_channels.

    Yields:
        Which image, the first row (along the first axis of S), and `[channels, rows, ...]` on the CPU. The tensor
        is reused: copy what you keep.
    """
    run = run or (lambda part: model.predict(part, **options))
    rows, *others = grid
    size = [axis[-1][0].stop for axis in grid]
    like = _sample(model)
    height = max(where.stop - where.start for where, _ in rows)
    dtype = torch.promote_types(like.dtype, torch.float32)
    band = torch.zeros(channels or network_of(model).out_channels, height, *size[1:], dtype=dtype)
    total = image.shape[0] * math.prod(map(len, grid))
    bar = need("tqdm", "commands").tqdm(total=total, desc="tiles", unit="tile", leave=False) if progress else None
    with nullcontext() if bar is None else bar:
        for index, (number, (where, weights)) in itertools.product(range(image.shape[0]), enumerate(rows)):
            for rest in itertools.product(*others):
                window = (where, *(part for part, _ in rest))
                part = run(_read(image[(index, slice(None), *window)], like))[0].to(band)
                for axis, factors in enumerate((weights, *(axis_weights for _, axis_weights in rest)), start=1):
                    part *= factors.to(part).view(-1, *[1] * (part.ndim - axis - 1))
                band[(slice(None), slice(where.stop - where.start), *window[1:])] += part
                if bar is not None:
                    bar.update()
            done = (rows[number + 1][0].start if number + 1 < len(rows) else where.stop) - where.start
            yield index, where.start, band[:, :done]
            for row in range(height):  # one at a time: the places overlap
                band[:, row] = band[:, row + done] if row + done < height else 0


def make_grid(
    model: nn.Module,
    size: Sequence[int],
    tile: int | Sequence[int] | None,
    overlap: float | Sequence[float] = 0.25,
    blend: str = "gaussian",
) -> list[Axis]:
    """The tiles along each axis of an image of `size`; `tile` None means one tile. The others as for `predict_tiled`.

    Raises:
        ValueError: an argument is out of range.
    """
    multiples = multiples_of(model)
    tiles = [tile] * len(size) if tile is None or isinstance(tile, int) else list(tile)
    fits = len(tiles) == len(size) and all(
        side is None or (side > 0 and side % step == 0) for side, step in zip(tiles, multiples, strict=True)
    )
    if not fits:
        what = f"{multiples[0]} (2^depth)" if len(set(multiples)) == 1 else f"{multiples}"
        raise ValueError(f"tile must be a positive multiple of {what}, or {len(size)} of them, not {tile!r}")
    shares = [overlap] * len(size) if isinstance(overlap, (int, float)) else list(overlap)
    if len(shares) != len(size) or not all(0.0 <= share < 1.0 for share in shares):
        raise ValueError(f"overlap must be 0 or more and below 1, or {len(size)} such numbers, not {overlap!r}")
    if blend not in BLENDS:
        raise ValueError(f"blend must be one of {BLENDS}, not {blend!r}")
    axes = zip(size, tiles, shares, multiples, strict=True)
    return [_axis(length, side or length, share, multiple, blend) for length, side, share, multiple in axes]


def _axis(size: int, tile: int, overlap: float, multiple: int, blend: str) -> Axis:
    """Tiles of an axis with weights, float64, that add up to 1 for each pixel. A grid of tiles is a product of axes, so
    the product of these weights needs no further normalisation."""
    padded = _round_up(size, multiple)
    tile = min(_round_up(tile, multiple), padded)
    step = max(multiple, int(tile * (1 - overlap) + 1e-9) // multiple * multiple)
    places = [slice(first, min(first + tile, size)) for first in [*range(0, padded - tile, step), padded - tile]]
    at = np.arange(tile) - (tile - 1) / 2
    curve = np.exp(-0.5 * (at / (SIGMA * tile)) ** 2) if blend == "gaussian" else np.ones(tile)
    total = np.zeros(size)
    for where in places:
        total[where] += curve[: where.stop - where.start]
    return [(where, torch.from_numpy(curve[: where.stop - where.start] / total[where])) for where in places]


def choose_tile(
    model: nn.Module, size: Sequence[int], max_memory: int | str, options: dict[str, Any] | None = None
) -> tuple[int, ...]:
    """The largest tile that is predicted within `max_memory`: a cube, cut where the image is smaller.

    Raises:
        ValueError: even the smallest tile needs more, or the model's memory cannot be counted.
    """
    multiples, budget = multiples_of(model), parse_bytes(max_memory)
    padded, multiple = list(map(_round_up, size, multiples)), max(multiples)
    for side in range(max(padded), 0, -multiple):
        tile = tuple(min(side // step * step or step, length) for length, step in zip(padded, multiples, strict=True))
        needed = memory(model, tile, size, options)
        if needed <= budget:
            return tile
        if side <= SMALLEST_TILE * multiple:
            break
    least = f"{math.ceil(needed / 2**20)}M"
    raise ValueError(f"max_memory {max_memory} is too small for tiles of {'x'.join(map(str, tile))}: they need {least}")


def memory(model: nn.Module, tile: Sequence[int], size: Sequence[int], options: dict[str, Any] | None = None) -> int:
    """Bytes that predicting an image of `size` by tiles of `tile` takes at its peak, counted from the topology.

    The reference needs most: it keeps the map of every node that has run, and the operands of the running one: input and
    output of a convolution, each twice, because convolution libraries reorder them. On a CPU PyTorch unfolds the input of
    some convolutions instead, one copy per tap, and freed memory is not all reused: there the sum counts twice. Added to
    this are the heads, the image, the band of results and, on a CPU, 16 MiB for the libraries.

    Raises:
        ValueError: the model has an encoder, or `options` name a level that it does not have.
    """
    if isinstance(model, Ensemble):  # each member runs alone, beside the sum of the results
        tiles = 2 * max(4, _sample(model).dtype.itemsize) * model.out_channels * math.prod(tile)
        return tiles + max(memory(member, tile, size, options) for member in model.members)
    network = network_of(model)
    if network.over_encoder:
        raise ValueError("the memory of this model cannot be counted: give tile= instead of max_memory=")
    topology = network.topology
    level, mode = (options or {}).get("level"), (options or {}).get("mode", "accurate")
    if level is not None or mode == "fast":
        topology = topology.pruned(topology.heads[-1] if level is None else level, keep_heads=mode == "accurate")
    like = _sample(model)
    width, on_cpu = max(4, like.dtype.itemsize), like.device.type == "cpu"
    kept = peak = 0
    for node in topology.nodes:
        sides = [max(1, side // by) for side, by in zip(tile, topology.shrunk(node.level), strict=True)]
        pixels = math.prod(sides)
        for cin, cout in topology.convolutions(node):
            unfolds = on_cpu and (width == 8 or (len(sides) == 3 and cin * sides[0] * sides[1] <= UNFOLDED))
            copies = 1 + math.prod(topology.kernel(node)) if unfolds else 2
            peak = max(peak, kept + pixels * (copies * cin + 2 * cout))
        kept += pixels * node.width
    heads = (3 * len(topology.heads) + 2) * network.out_channels
    image = 24 * topology.in_channels  # bytes: as read, in float64, and in the model's precision
    maps = width * peak * (HEAP if on_cpu else 1)
    band = width * network.out_channels * tile[0] * math.prod(size[1:])
    if (options or {}).get("flips"):  # the mirror image and its result, beside the sum
        image += width * (topology.in_channels + 2 * network.out_channels)
    return maps + (width * heads + image) * math.prod(tile) + band + (RESERVE if on_cpu else 0)


def parse_bytes(text: int | str) -> int:
    """Bytes of a number, or of a text such as "512M" or "1.5G" (of 1024).

    Raises:
        ValueError: it is neither, or it is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(text), flags=re.IGNORECASE)
    count = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if count < 1:
        raise ValueError(f"{text!r} is not an amount of memory such as 512M or 2G")
    return count


def multiples_of(model: nn.Module) -> tuple[int, ...]:
    """What each axis of the model's input is padded to a multiple of."""
    return network_of(model).multiples


def network_of(model: nn.Module) -> nn.Module:
    """The network with a topology that `model` is, or that `optimize` put into it."""
    return getattr(model, "network", model)


def _round_up(size: int, multiple: int) -> int:
    return size + -size % multiple


def _sample(model: nn.Module) -> Tensor:
    """A tensor of the device and precision that the model takes."""
    return next(itertools.chain(model.parameters(), model.buffers()), torch.empty(0))


def _read(part: Any, like: Tensor) -> Tensor:
    """A slice of an image as `[1, C, *tile]`."""
    if not isinstance(part, Tensor):
        part = torch.from_numpy(np.array(part, np.float64 if like.dtype == torch.float64 else np.float32))
    return part[None].to(like)
