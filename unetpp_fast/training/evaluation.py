"""Mean scores of a network over whole images, which are computed tile by tile where one pass would take too much memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..architecture.input_checks import check_input
from ..architecture.precision import autocast
from ..data.samples import ArraySample, Sample
from ..models import tiled_prediction
from ..models.network import Network
from ..models.prediction import evaluating, logits_of_any_size, mean_probabilities
from . import processes
from .exclusive import class_scores, confusion
from .loss_table import is_exclusive
from .metrics import dice_score, iou_score, overlap_scores, overlaps
from .surface import surface_distances, surface_means, surface_sums

MEMORY = "2G"
TILES = {2: 512, 3: 96}  # of networks over an encoder, whose memory nobody can count; by the number of axes
COPIES = 6  # of the logits of a head, while a loss or a score is computed


def evaluate(
    network: Network,
    samples: Sequence[Sample | ArraySample],
    *,
    dtype: str = "float32",
    loss: nn.Module | None = None,
    max_memory: int | str = MEMORY,
    surface: bool = False,
) -> dict[str, Any]:
    """Means over whole images of IoU and Dice of the accurate mode, and of the loss.

    With several processes each computes its share of the images; all must call this, and all get the same means.

    Args:
        network: in any mode, which is kept; images are padded to a size that it takes.
        samples: the images with their masks; not empty.
        dtype: the precision, a name as in `Recipe`.
        loss: as for `Trainer`; None to leave it out.
        max_memory: bytes, or a text such as "512M". An image that takes more in one pass is computed in tiles that fit,
            whose logits are blended (`tiled_prediction`). Weights, images and masks are not counted.
        surface: whether to measure distances between surfaces too, in the samples' spacing (extra `metrics`).

    Returns:
        Keys "iou" and "dice", and "loss" if one is given. Of several classes, "class_iou" and "class_dice" are lists of
        scores over all pixels of all images; a class without a pixel in the masks and the predictions has NaN. With an
        exclusive loss "iou" and "dice" are the means of these, and "confusion" is a matrix (`exclusive.class_scores`).
        With `surface` the keys of `surface.surface_means` too.
    """
    exclusive, count = loss is not None and is_exclusive(loss), network.out_channels
    rows = torch.zeros(len(samples), 3, dtype=torch.float64)  # loss, IoU, Dice; each process fills its rows
    pixels = torch.zeros(count, max(count, 2), dtype=torch.float64)  # a confusion matrix, or overlaps in two columns
    distances = torch.zeros(count, 4, dtype=torch.float64)
    with evaluating(network):
        for index in range(processes.rank(), len(samples), processes.size()):
            image, mask = samples[index].load()
            outputs = logits(network, image, dtype, max_memory)
            mask = torch.from_numpy(mask)[None].to(outputs[0].device)
            rows[index, 0] = float(loss(outputs, mask.float())) if loss else 0.0
            probabilities = mean_probabilities(outputs, "softmax" if exclusive else "sigmoid")
            if surface:
                chosen = _chosen(probabilities, mask) if exclusive else probabilities > 0.5
                distances += surface_sums(surface_distances(chosen[0], mask[0], _spacing(samples[index], mask.ndim - 2)))
            if exclusive:
                pixels += confusion(probabilities, mask).cpu()
                continue
            pixels[:, :2] += overlaps(probabilities, mask).cpu()
            rows[index, 1] = float(iou_score(probabilities, mask))
            rows[index, 2] = float(dice_score(probabilities, mask))
    means = dict(zip(("loss", "iou", "dice"), processes.summed(rows).mean(dim=0).tolist(), strict=True))
    if exclusive:
        means |= _of_classes(processes.summed(pixels))
    elif count > 1:
        means |= {f"class_{key}": values for key, values in overlap_scores(processes.summed(pixels)[:, :2]).items()}
    if surface:
        means |= surface_means(processes.summed(distances))
    return {key: value for key, value in means.items() if loss or key != "loss"}


def _chosen(probabilities: Tensor, mask: Tensor) -> Tensor:
    """The most probable of exclusive classes, one-hot; none where the mask has none."""
    best = probabilities.argmax(dim=1, keepdim=True)
    return torch.zeros_like(probabilities).scatter_(1, best, 1.0) * mask.any(dim=1, keepdim=True)


def _spacing(sample: Any, axes: int) -> Sequence[float] | None:
    """The size of a sample's pixels or voxels along its last axes, if it knows it."""
    found = sample.spacing() if hasattr(sample, "spacing") else None
    return None if found is None else found[-axes:]


def logits(network: Network, image: np.ndarray, dtype: str, max_memory: int | str) -> list[Tensor]:
    """Logits of each head, `[1, classes, *S]` on the network's device, of an image float32 `[C, *S]` of any size."""
    device, size = next(network.parameters()).device, image.shape[1:]
    tile = tile_within(network, size, max_memory)
    with autocast(device, dtype):
        if all(side >= length for side, length in zip(tile, size, strict=True)):
            x = torch.from_numpy(image)[None].to(device)
            check_input(network, x, any_size=True)
            return logits_of_any_size(network, x)
        check_input(network, torch.empty(1, *image.shape, device="meta"), any_size=True)
        heads = len(network.topology.heads)
        wide = torch.promote_types(next(network.parameters()).dtype, torch.float32)
        blended = torch.empty(1, heads * network.out_channels, *size, dtype=wide)
        grid = tiled_prediction.make_grid(network, size, tile)
        joined: dict[str, Any] = {
            "run": lambda part: torch.cat(logits_of_any_size(network, part), dim=1),
            "channels": blended.shape[1],
        }
        for _, first, band in tiled_prediction.bands(network, image[None], grid, **joined):
            blended[0, :, first : first + band.shape[1]] = band
    return list(blended.to(device).split(network.out_channels, dim=1))


def tile_within(network: Network, size: Sequence[int], max_memory: int | str) -> tuple[int, ...]:
    """The tile in which an image of `size` is evaluated: all of it, or the largest that fits with the logits of the image;
    the smallest that makes sense if none does. Over an encoder it is fixed (`TILES`)."""
    multiple = network.multiple
    padded = tuple(length + -length % multiple for length in size)
    if network.over_encoder:
        fixed = TILES[len(size)] + -TILES[len(size)] % multiple
        return tuple(min(fixed, length) for length in padded)
    heads, pixels = len(network.topology.heads), math.prod(size)
    kept = 4 * network.out_channels * pixels * (heads + COPIES)
    budget = tiled_prediction.parse_bytes(max_memory) - kept
    for side in range(max(padded), tiled_prediction.SMALLEST_TILE * multiple, -multiple):
        tile = tuple(min(side, length) for length in padded)
        band = 4 * (heads - 1) * network.out_channels * tile[0] * math.prod(size[1:])  # one head's is counted
        if tiled_prediction.memory(network, tile, size) + band <= budget:
            return tile
    return tuple(min(tiled_prediction.SMALLEST_TILE * multiple, length) for length in padded)


def _of_classes(pixels: torch.Tensor) -> dict[str, Any]:
    scores = class_scores(pixels)
    means = {key: float(torch.tensor(values).nanmean()) for key, values in scores.items()}
    return {**means, **{f"class_{key}": values for key, values in scores.items()}, "confusion": pixels.long().tolist()}
