"""Intersection over union and Dice of masks thresholded at 0.5, per image and then averaged."""

from __future__ import annotations

from torch import Tensor

from .losses import check_pair


def iou_score(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of |A and B| / |A or B|, with A = probabilities > 0.5 and B = target > 0.5.

    Args:
        probabilities, target: `[N, C, *S]`; the pixels of all classes of an image are counted together.

    Returns:
        A scalar tensor, float32; an image in which both masks are empty counts as 1.

    Raises:
        ValueError: shapes differ, or the batch is empty.
    """
    both, either, _ = _areas(probabilities, target)
    return _ratio(both, either)


def dice_score(probabilities: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of 2 |A and B| / (|A| + |B|); arguments and errors as in `iou_score`."""
    both, _, total = _areas(probabilities, target)
    return _ratio(2 * both, total)


def _areas(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_pair(probabilities, target, "probabilities")
    a, b = (probabilities > 0.5).flatten(1), (target > 0.5).flatten(1)
    both = (a & b).sum(dim=1)
    total = a.sum(dim=1) + b.sum(dim=1)
    return both, total - both, total


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return (part / whole.clamp(min=1)).where(whole > 0, 1.0).mean()
