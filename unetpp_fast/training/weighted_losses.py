"""Focal and Tversky loss, for overlapping and for exclusive classes of unequal size, and the weights of classes and heads.

With exclusive classes a target is one-hot, and a pixel that belongs to no class is ignored, as in `exclusive.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..common.errors import InputError
from .losses import ClassWeighted, divisor

HEAD_WEIGHTS = ("equal", "halving")


class FocalLoss(ClassWeighted):
    """Cross-entropy in which pixels that are right already count little (Lin et al., 2017,
    https://arxiv.org/abs/1708.02002, eq. 5).

    With p_t the probability of what is true, of a pixel and a class (sigmoid), or of the pixel's class (softmax)::

        loss = mean of -w (1 - p_t)^gamma log p_t, over the pixels and classes, or over the pixels that belong to a class

    per image, and then over the images. The mean over exclusive classes is weighted, the sum of w being its divisor, as
    PyTorch's cross-entropy; an image without any pixel to count has the loss 0.

    Args:
        gamma: at least 0; 0 gives cross-entropy.
        alpha: between 0 and 1, of overlapping classes: foreground counts alpha times, background 1 - alpha times.
        exclusive: whether the classes exclude one another (softmax), or may overlap (sigmoid).
        weights: one positive number per class; None: all count alike.
        background: whether class 0 of exclusive classes counts.
    """

    def __init__(
        self,
        gamma: float = 2.0,
        alpha: float | None = None,
        *,
        exclusive: bool = False,
        weights: Sequence[float] | None = None,
        background: bool = True,
    ):
        super().__init__(exclusive, weights, background)
        if not 0 <= gamma < math.inf:
            raise InputError(f"gamma must be at least 0 and finite, not {gamma}")
        if alpha is not None and (exclusive or not 0 < alpha < 1):
            raise InputError(f"alpha is of overlapping classes, between 0 and 1, not {alpha}: exclusive ones take weights")
        self.gamma, self.alpha = gamma, alpha

    def _image_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        weights = self._class_weights(logits).view(1, -1, 1)
        if self.exclusive:
            log_p = (target * logits.log_softmax(dim=1)).sum(dim=1)  # of the pixel's class; 0 where there is none
            each = (target * weights).sum(dim=1)
            off = (1 - log_p.exp()).clamp(min=torch.finfo(log_p.dtype).eps)  # a power below 1 has no gradient at 0
            return -(each * off**self.gamma * log_p).sum(dim=1) / divisor(each.sum(dim=1))
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        off = F.logsigmoid((1 - 2 * target) * logits)  # log(1 - p_t), for targets of 0 and 1
        part = entropy * (self.gamma * off).exp()
        if self.alpha is not None:
            part = part * (self.alpha * target + (1 - self.alpha) * (1 - target))
        return (part * weights).mean(dim=2).sum(dim=1) / weights.sum()

    def _numbers(self) -> list[str]:
        return [f"gamma={self.gamma}", *([] if self.alpha is None else [f"alpha={self.alpha}"])]


class TverskyLoss(ClassWeighted):
    """One minus the Tversky index, in which missed and false pixels count differently (Salehi et al., 2017,
    https://arxiv.org/abs/1706.05721, eq. 3).

    Of an image and a class with probabilities p and target y, over the pixels (that belong to a class)::

        T = (sum(p y) + smooth) / (sum(p y) + alpha sum(p (1 - y)) + beta sum((1 - p) y) + smooth)

    The loss is the mean of 1 - T over the classes, weighted, and over the images. Of exclusive classes those without a pixel
    in the image are left out; an image without any has the loss 0.

    Args:
        alpha: weight of false pixels. beta: of missed ones; 0.3 and 0.7 are the paper's best, 0.5 and 0.5 give Dice.
        smooth: as in `BCEDiceLoss`.
        exclusive: whether the classes exclude one another (softmax), or may overlap (sigmoid).
        weights: one positive number per class; None: all count alike.
        background: whether class 0 of exclusive classes counts.
    """

    def __init__(
        self,
        alpha: float = 0.3,
        beta: float = 0.7,
        smooth: float = 1e-5,
        *,
        exclusive: bool = False,
        weights: Sequence[float] | None = None,
        background: bool = True,
    ):
        super().__init__(exclusive, weights, background)
        if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
            raise InputError(f"alpha and beta must be at least 0, finite and not both 0, not {alpha} and {beta}")
        self.alpha, self.beta, self.smooth = alpha, beta, smooth

    def _image_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        p = logits.softmax(dim=1) * target.sum(dim=1, keepdim=True) if self.exclusive else logits.sigmoid()
        both, chosen, size = (p * target).sum(dim=2), p.sum(dim=2), target.sum(dim=2)
        wrong = self.alpha * (chosen - both) + self.beta * (size - both)
        index = (both + self.smooth) / (both + wrong + self.smooth)
        each = self._class_weights(logits) * ((size > 0) if self.exclusive else torch.ones_like(size))
        return ((1 - index) * each).sum(dim=1) / divisor(each.sum(dim=1))

    def _numbers(self) -> list[str]:
        return [f"alpha={self.alpha}", f"beta={self.beta}", f"smooth={self.smooth}"]


class DeepSupervision(nn.Module):
    """Any loss of logits and a target as a loss of a list of logits, one per head: the weighted mean over the heads.

    Args:
        loss: a module, such as MONAI's, that takes logits `[N, C, *S]` and a target of that shape.
        weights: "equal", the paper's (Zhou et al., 2018, https://arxiv.org/abs/1807.10165); "halving": the deepest head, the
            last, counts most and each before it half as much as the next (Isensee et al., 2021). They add up to 1.
        exclusive: whether its classes exclude one another; None: as the loss's own attribute `exclusive` says, else no.
    """

    def __init__(self, loss: nn.Module, weights: str = "equal", *, exclusive: bool | None = None):
        super().__init__()
        if weights not in HEAD_WEIGHTS:
            raise InputError(f"the weights of heads are {' or '.join(HEAD_WEIGHTS)}, not {weights!r}")
        self.loss, self.weights = loss, weights
        self.exclusive = bool(getattr(loss, "exclusive", False)) if exclusive is None else exclusive

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """A scalar of logits `[N, C, *S]`, or a list of them with the deepest head last, and a target of that shape.

        Raises:
            ValueError: the list is empty; and what the loss raises.
        """
        heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not heads:
            raise ValueError("the list of outputs is empty: pass the logits of at least one head")
        shares = [2.0**number if self.weights == "halving" else 1.0 for number in range(len(heads))]
        return sum(share * self.loss(head, target) for share, head in zip(shares, heads, strict=True)) / sum(shares)

    def extra_repr(self) -> str:
        return f"weights={self.weights!r}"


def balanced_weights(counts: Sequence[float], names: Sequence[str]) -> tuple[float, ...]:
    """Weights by which all classes count alike: all pixels / (classes * pixels of the class), as scikit-learn's "balanced".

    Args:
        counts: pixels of each class in the training images.
        names: of the classes, for messages.

    Raises:
        InputError: there is one class, or one without a pixel.
    """
    if len(counts) < 2:
        raise InputError("weights balance classes against one another, but there is one: try the loss tversky, or focal")
    empty = [name for name, count in zip(names, counts, strict=True) if not count]
    if empty:
        raise InputError(f"no training image holds the class {empty[0]}, so that its weight is unknown: give numbers")
    return tuple(sum(counts) / (len(counts) * count) for count in counts)
