"""Intersection over union and Dice of masks thresholded at 0.5, per image and then averaged."""

from __future__ import annotations

import torch
from torch import Tensor

from .losses import check_pair, check_unit


def iou_score(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of `|A and B| / |A or B|`, with A = probabilities > 0.5 and B = target > 0.5.

    Args:
        probabilities, target: `[N, C, *S]`; the pixels of all classes of an image are counted together.

    Returns:
        A scalar tensor, float32; an image in which both masks are empty counts as 1.

    Raises:
        ValueError: shapes differ, the batch is empty, or values are not in [0, 1]; on a GPU and in graphs the score is then
            NaN.
    """
    both, either, _, valid = _areas(probabilities, target)
    return _ratio(both, either, valid)


def dice_score(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of `2 |A and B| / (|A| + |B|)`, with A = probabilities > 0.5 and B = target > 0.5.

    Args:
        probabilities, target: `[N, C, *S]`; the pixels of all classes of an image are counted together.

    Returns:
        A scalar tensor, float32; an image in which both masks are empty counts as 1.

    Raises:
        ValueError: as for `iou_score`.
    """
    both, _, total, valid = _areas(probabilities, target)
    return _ratio(2 * both, total, valid)


def _areas(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    check_pair(probabilities, target, "probabilities")
    checks = [
        check_unit(probabilities, "the first argument", "give probabilities, logits.sigmoid()"),
        check_unit(target, "the target", "a mask of 0 and 255 is mask > 0"),
    ]
    a, b = (probabilities > 0.5).flatten(1), (target > 0.5).flatten(1)
    both = (a & b).sum(dim=1)
    total = a.sum(dim=1) + b.sum(dim=1)
    return both, total - both, total, [valid for valid in checks if valid is not None]


def _ratio(part: Tensor, whole: Tensor, checks: list[Tensor]) -> Tensor:
    score = (part / whole.clamp(min=1)).where(whole > 0, 1.0).mean()
    for valid in checks:
        score = score.where(valid, torch.nan)
    return score


def overlaps(probabilities: Tensor, target: Tensor) -> Tensor:
    """Pixels of all images in both masks, and in one plus the other, by class: int64 `[C, 2]`; arguments as `iou_score`."""
    check_pair(probabilities, target, "probabilities")
    a, b = ((values > 0.5).transpose(0, 1).flatten(1) for values in (probabilities, target))
    return torch.stack([(a & b).sum(dim=1), a.sum(dim=1) + b.sum(dim=1)], dim=1)


def overlap_scores(counts: Tensor) -> dict[str, list[float]]:
    """IoU and Dice of each class by its `overlaps`: keys "iou" and "dice", C numbers each; NaN where there is no pixel."""
    both, total = counts.double().unbind(dim=1)
    return {"iou": (both / (total - both)).tolist(), "dice": (2 * both / total).tolist()}
