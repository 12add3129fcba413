"""Classes that exclude each other, as in label maps: the loss, and scores per class.

A target is one-hot, `[N, K, *S]`, 1 where a pixel belongs to the class. A pixel that belongs to none is ignored: it counts
neither in the loss nor in a score. Predictions are the classes with the largest logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .losses import check_pair


class CrossEntropyDiceLoss(nn.Module):
    """entropy * cross-entropy + dice * (1 - dice) per image, averaged over the images, and over the heads of a list.

    For an image with p = softmax(logits) and a one-hot target y, over the pixels that belong to a class::

        cross-entropy = mean over the pixels of -log p of the pixel's class
        dice          = mean over the classes k in the image of (2 sum(p_k y_k) + smooth) / (sum(p_k) + sum(y_k) + smooth)

    The background is a class like the others. The dice term leaves out a class without a pixel in the image; an image
    without any pixel to count has the loss 0. Computed in float32, or in float64 for float64 logits.

    Args:
        entropy, dice: the weights of the two terms.
        smooth: as in `BCEDiceLoss`.
    """

    exclusive = True

    def __init__(self, entropy: float = 1.0, dice: float = 1.0, smooth: float = 1e-5):
        super().__init__()
        self.entropy, self.dice, self.smooth = entropy, dice, smooth

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss, a scalar, of logits `[N, K, *S]`, or a list of them, and a one-hot target of that shape.

        Raises:
            ValueError: shapes differ, the batch is empty, or there is one class.
        """
        heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not heads:
            raise ValueError("the list of outputs is empty: pass the logits of at least one head")
        loss: Any = sum(self._head(logits, target) for logits in heads) / len(heads)
        return loss

    def _head(self, logits: Tensor, target: Tensor) -> Tensor:
        check_pair(logits, target, "outputs")
        if logits.shape[1] < 2:
            raise ValueError("exclusive classes need 2 channels or more, with the background; for one use BCEDiceLoss")
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        logits, target = logits.flatten(2), target.to(logits.dtype).flatten(2)
        log_p = logits.log_softmax(dim=1)
        counted, sizes = target.sum(dim=1, keepdim=True), target.sum(dim=2)
        entropy = -(target * log_p).sum(dim=(1, 2)) / sizes.sum(dim=1).clamp(min=1)
        p = log_p.exp() * counted
        ratio = (2 * (p * target).sum(dim=2) + self.smooth) / (p.sum(dim=2) + sizes + self.smooth)
        occurs = (sizes > 0).to(ratio.dtype)
        missed = ((1 - ratio) * occurs).sum(dim=1) / occurs.sum(dim=1).clamp(min=1)
        return (self.entropy * entropy + self.dice * missed).mean()

    def extra_repr(self) -> str:
        return f"entropy={self.entropy}, dice={self.dice}, smooth={self.smooth}"


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
    both, total = matrix.diagonal(), matrix.sum(dim=0) + matrix.sum(dim=1)
    return {"iou": (both / (total - both)).tolist(), "dice": (2 * both / total).tolist()}
