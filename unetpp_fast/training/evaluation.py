"""Mean scores of a network over whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..architecture.input_checks import check_input
from ..architecture.precision import autocast
from ..data.samples import ArraySample, Sample
from ..models.network import Network
from ..models.prediction import evaluating, logits_of_any_size, mean_probabilities
from . import processes
from .exclusive import class_scores, confusion
from .loss_table import is_exclusive
from .metrics import dice_score, iou_score


def evaluate(
    network: Network,
    samples: Sequence[Sample | ArraySample],
    *,
    dtype: str = "float32",
    loss: nn.Module | None = None,
) -> dict[str, Any]:
    """Means over whole images of IoU and Dice of the accurate mode, and of the loss.

    With several processes each computes its share of the images; all must call this, and all get the same means.

    Args:
        network: in any mode, which is kept; images are padded to a size that it takes.
        samples: the images with their masks; not empty.
        dtype: the precision, a name as in `Recipe`.
        loss: as for `Trainer`; None to leave it out.

    Returns:
        Keys "iou" and "dice", and "loss" if one is given. With an exclusive loss they are means over the classes, of scores
        over all pixels of all images (`exclusive.class_scores`), and "class_iou", "class_dice" and "confusion" are lists.
    """
    device = next(network.parameters()).device
    exclusive, count = loss is not None and is_exclusive(loss), network.out_channels
    rows = torch.zeros(len(samples), 3, dtype=torch.float64)  # loss, IoU, Dice; each process fills its rows
    pixels = torch.zeros(count, count, dtype=torch.float64)
    with evaluating(network):
        for index in range(processes.rank(), len(samples), processes.size()):
            image, mask = (torch.from_numpy(values)[None].to(device) for values in samples[index].load())
            with autocast(device, dtype):
                check_input(network, image, any_size=True)
                outputs = logits_of_any_size(network, image)
            rows[index, 0] = float(loss(outputs, mask.float())) if loss else 0.0
            probabilities = mean_probabilities(outputs, "softmax" if exclusive else "sigmoid")
            if exclusive:
                pixels += confusion(probabilities, mask).cpu()
                continue
            rows[index, 1] = float(iou_score(probabilities, mask))
            rows[index, 2] = float(dice_score(probabilities, mask))
    means = dict(zip(("loss", "iou", "dice"), processes.summed(rows).mean(dim=0).tolist(), strict=True))
    if exclusive:
        means |= _of_classes(processes.summed(pixels))
    return {key: value for key, value in means.items() if loss or key != "loss"}


def _of_classes(pixels: torch.Tensor) -> dict[str, Any]:
    scores = class_scores(pixels)
    means = {key: float(torch.tensor(values).nanmean()) for key, values in scores.items()}
    return {**means, **{f"class_{key}": values for key, values in scores.items()}, "confusion": pixels.long().tolist()}
