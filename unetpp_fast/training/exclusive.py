"""Classes that exclude each other, as in label maps: the loss, and scores per class.

A target is one-hot, `[N, K, *S]`, 1 where a pixel belongs to the class. A pixel that belongs to none is ignored: it counts
neither in the loss nor in a score. Predictions are the classes with the largest logit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .losses import ClassWeighted, check_pair, class_options, divisor
from .metrics import overlap_scores


class CrossEntropyDiceLoss(ClassWeighted):
    """entropy * cross-entropy + dice * (1 - dice) per image, averaged over the images, and over the heads of a list.

    For an image with p = softmax(logits) and a one-hot target y, over the pixels that belong to a class::

        cross-entropy = mean over the pixels of -log p of the pixel's class
        dice          = mean over the classes k in the image of (2 sum(p_k y_k) + smooth) / (sum(p_k) + sum(y_k) + smooth)

    The dice term leaves out a class without a pixel in the image; an image without any pixel to count has the loss 0.
    Computed in float32, or in float64 for float64 logits.

    Args:
        entropy, dice: the weights of the two terms.
        smooth: as in `BCEDiceLoss`.
        weights: one positive number per class: both means are weighted, the sum of the weights being their divisor.
        background: whether the dice term counts class 0; the cross-entropy does.
    """

    def __init__(
        self,
        entropy: float = 1.0,
        dice: float = 1.0,
        smooth: float = 1e-5,
        *,
        weights: Sequence[float] | None = None,
        background: bool = True,
    ):
        super().__init__(True, weights, background)
        self.entropy, self.dice, self.smooth = entropy, dice, smooth

    def _image_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = torch.ones_like(logits[0, :, 0]) if self.factors is None else self.factors.to(logits.dtype)
        log_p = logits.log_softmax(dim=1)
        counted, sizes = target.sum(dim=1, keepdim=True), target.sum(dim=2)
        entropy = -(target * log_p * weights.view(1, -1, 1)).sum(dim=(1, 2)) / divisor((sizes * weights).sum(dim=1))
        p = log_p.exp() * counted
        ratio = (2 * (p * target).sum(dim=2) + self.smooth) / (p.sum(dim=2) + sizes + self.smooth)
        occurs = (sizes > 0) * self._class_weights(logits)
        missed = ((1 - ratio) * occurs).sum(dim=1) / divisor(occurs.sum(dim=1))
        return self.entropy * entropy + self.dice * missed

    def extra_repr(self) -> str:
        numbers = f"entropy={self.entropy}, dice={self.dice}, smooth={self.smooth}"
        return ", ".join([numbers, *class_options(self.weights, self.background)])


def exclusive_iou(scores: Tensor, target: Tensor) -> Tensor:
    """Mean over the images of the mean IoU of the classes that occur in the prediction or in the target.

    Args:
        scores: logits or probabilities, and a one-hot target, `[N, K, *S]`.

    Returns:
        A scalar, float32; an image without any pixel to count has 1. The device is not waited for.
    """
    check_pair(scores, target, "scores")
    truth = target.flatten(2) > 0.5
    classes = torch.arange(scores.shape[1], device=scores.device).view(1, -1, 1)
    chosen = (scores.flatten(2).argmax(dim=1, keepdim=True) == classes) & truth.any(dim=1, keepdim=True)
    both, either = (chosen & truth).sum(dim=2), (chosen | truth).sum(dim=2)
    occurs = either > 0
    means = (both / either.clamp(min=1)).sum(dim=1) / occurs.sum(dim=1).clamp(min=1)
    return means.where(occurs.any(dim=1), 1.0).mean()


def confusion(scores: Tensor, target: Tensor) -> Tensor:
    """How many pixels of each class (rows) are predicted as each class (columns): int64 `[K, K]`; arguments as above."""
    check_pair(scores, target, "scores")
    count = scores.shape[1]
    truth = target.flatten(2) > 0.5
    counted = truth.any(dim=1)
    pairs = truth.int().argmax(dim=1)[counted] * count + scores.flatten(2).argmax(dim=1)[counted]
    return torch.bincount(pairs, minlength=count**2).view(count, count)


def class_scores(matrix: Tensor) -> dict[str, list[float]]:
    """IoU and Dice of each class over all pixels of a `confusion` matrix.

    A class that occurs neither in the targets nor in the predictions has no score: NaN. Means are taken over the others.

    Returns:
        Keys "iou" and "dice", K numbers each.
    """
    matrix = matrix.double()
    return overlap_scores(torch.stack([matrix.diagonal(), matrix.sum(dim=0) + matrix.sum(dim=1)], dim=1))
