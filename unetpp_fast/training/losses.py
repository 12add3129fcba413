"""The paper's loss: binary cross-entropy plus dice, on every head (Zhou et al., 2018, eq. 2). What all losses share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..common.errors import InputError

UNIT_SLACK = 1e-3  # by which interpolated masks and rounded probabilities may leave [0, 1]


class ClassWeighted(nn.Module):
    """What these losses share: forms of the outputs, the activation, weights of classes.

    Args:
        exclusive: whether the classes exclude one another (softmax), or may overlap (sigmoid).
        weights: one positive number per class; None: all count alike.
        background: whether class 0 of exclusive classes counts.
    """

    def __init__(self, exclusive: bool, weights: Sequence[float] | None, background: bool):
        super().__init__()
        if not background and not exclusive:
            raise InputError("background=False leaves out class 0 of exclusive classes: overlapping ones have no background")
        self.exclusive, self.background, self.weights = exclusive, background, checked_weights(weights)
        self.register_buffer("factors", None if weights is None else torch.tensor(self.weights), persistent=False)

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss, a scalar, of logits `[N, K, *S]`, or a list of them, whose losses are averaged, and a target of that
        shape, computed in float32 at least.

        Raises:
            ValueError: shapes differ, the batch is empty, the number of weights is another, exclusive classes are fewer
                than two, or a target of overlapping classes has values outside [0, 1]. On a GPU and in graphs, where a
                look at the values would wait, the loss is then NaN.
        """
        heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not heads:
            raise ValueError("the list of outputs is empty: pass the logits of at least one head")
        for logits in heads:
            check_pair(logits, target, "outputs")
        check_classes(heads[0], self.exclusive, self.weights)
        valid = None if self.exclusive else check_unit(target, "the target", "a mask of 0 and 255 is (mask > 0).float()")
        loss: Any = sum(self._image_losses(*self._flat(logits, target)).mean() for logits in heads) / len(heads)
        return loss if valid is None else loss.where(valid, torch.nan)

    def _flat(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        shape = (*logits.shape[:2], -1)
        return logits.reshape(shape), target.to(logits.dtype).reshape(shape)

    def _image_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """`[N]` from `[N, K, pixels]`."""
        raise NotImplementedError

    def _class_weights(self, like: Tensor) -> Tensor:
        """`[K]`, 0 for a background that is left out."""
        weights = like.new_ones(like.shape[1]) if self.factors is None else self.factors.to(like.dtype)
        if not self.background:
            weights = weights * (torch.arange(like.shape[1], device=like.device) > 0)
        return weights

    def extra_repr(self) -> str:
        return ", ".join([f"exclusive={self.exclusive}", *self._numbers(), *class_options(self.weights, self.background)])

    def _numbers(self) -> list[str]:
        return []


class BCEDiceLoss(ClassWeighted):
    """½·BCE + (1 - dice) per image, averaged over the images; for a list of outputs, averaged over the heads.

    For image b with probabilities p = sigmoid(logits) and target y, over its pixels and classes::

        loss_b = ½ mean(-y log p - (1 - y) log(1 - p)) + 1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)

    This is eq. 2 of the paper of UNet++ (https://arxiv.org/abs/1807.10165) with the full cross-entropy (the paper prints
    only y log p) and with 1 added, so that the loss is not negative. It is computed in float32, or in float64 for
    float64 logits.

    Args:
        smooth: avoids a division by zero for images without foreground.
        weights: one positive number per class, by which its share of the mean and of the sums is multiplied.
    """

    def __init__(self, smooth: float = 1e-5, weights: Sequence[float] | None = None):
        super().__init__(False, weights, background=True)
        self.smooth = smooth

    def _image_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        p = logits.sigmoid()
        both, sizes = p * target, (p, target)
        if self.weights is not None:
            shares = self._class_weights(logits).view(1, -1, 1)
            shares = shares / shares.mean()
            bce, both, sizes = bce * shares, both * shares, (p * shares, target * shares)
        total = sum(size.flatten(1).sum(dim=1) for size in sizes)
        dice = (2 * both.flatten(1).sum(dim=1) + self.smooth) / (total + self.smooth)
        return 0.5 * bce.flatten(1).mean(dim=1) + 1 - dice

    def extra_repr(self) -> str:
        return ", ".join([f"smooth={self.smooth}", *class_options(self.weights, True)])


def check_pair(values: Tensor, target: Tensor, what: str) -> None:
    """Raises ValueError unless both have the same shape `[N, C, *S]` with at least one image; `what` names the values."""
    if values.shape != target.shape:
        raise ValueError(
            f"{what} {tuple(values.shape)} and target {tuple(target.shape)} must have the same shape [N, C, *S]"
        )
    if values.ndim < 2 or values.numel() == 0:
        raise ValueError(f"{what} of shape {tuple(values.shape)} hold no image: an empty batch has no mean")


def check_unit(values: Tensor, what: str, how: str) -> Tensor | None:
    """Raises ValueError if a value lies outside of [0, 1]; `how` says how to get others. Where values cannot be looked at
    without waiting, or in a graph, returns instead whether none does. NaN is left to what is computed from it."""
    if values.dtype == torch.bool:
        return None
    low, high = values.aminmax()
    valid = ~((low < -UNIT_SLACK) | (high > 1 + UNIT_SLACK))
    plain = type(values) in (Tensor, nn.Parameter) and values.device.type == "cpu" and not torch.compiler.is_compiling()
    if not plain or torch.jit.is_tracing() or peek_interpreter_stack() or _get_current_dispatch_mode() is not None:
        return valid
    if not valid:
        raise ValueError(f"{what} has values from {low.item():g} to {high.item():g}, not in [0, 1]: {how}")
    return None


def checked_weights(weights: Sequence[float] | None) -> tuple[float, ...] | None:
    """Weights of classes as numbers.

    Raises:
        InputError: one is not positive and finite.
    """
    if weights is None:
        return None
    found = tuple(float(weight) for weight in weights)
    if not found or not all(0 < weight < math.inf for weight in found):
        raise InputError(f"weights of classes must be positive and finite, not {found}")
    return found


def check_classes(logits: Tensor, exclusive: bool, weights: Sequence[float] | None) -> None:
    """Raises ValueError unless logits `[N, K, *S]` have as many classes as there are weights, two or more if exclusive."""
    if exclusive and logits.shape[1] < 2:
        raise ValueError("exclusive classes need 2 channels or more, with the background; for one use BCEDiceLoss")
    if weights is not None and len(weights) != logits.shape[1]:
        raise ValueError(f"there are {len(weights)} weights of classes for {logits.shape[1]} classes")


def class_options(weights: Sequence[float] | None, background: bool) -> list[str]:
    """How a loss shows them; nothing for defaults, as losses of older checkpoints."""
    return [*([] if weights is None else [f"weights={weights}"]), *([] if background else ["background=False"])]


def divisor(total: Tensor) -> Tensor:
    """A sum of weights, 1 where it is 0."""
    return total.where(total > 0, 1.0)
