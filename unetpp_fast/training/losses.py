"""The paper's loss: binary cross-entropy plus dice, on every head (Zhou et al., 2018, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

UNIT_SLACK = 1e-3  # by which interpolated masks and rounded probabilities may leave [0, 1]


class BCEDiceLoss(nn.Module):
    """½·BCE + (1 - dice) per image, averaged over the images; for a list of outputs, averaged over the heads.

    For image b with probabilities p = sigmoid(logits) and target y, over its pixels and classes::

        loss_b = ½ mean(-y log p - (1 - y) log(1 - p)) + 1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)

    This is eq. 2 of the paper of UNet++ (https://arxiv.org/abs/1807.10165) with the full cross-entropy (the paper prints
    only y log p) and with 1 added, so that the loss is not negative. It is computed in float32, or in float64 for
    float64 logits.

    Args:
        smooth: avoids a division by zero for images without foreground.
    """

    def __init__(self, smooth: float = 1e-5):
        super().__init__()
        self.smooth = smooth

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss, a scalar, of logits `[N, C, *S]`, or a list of them, and a target of that shape with values in [0, 1].

        Raises:
            ValueError: shapes differ, the batch is empty, or the target has other values. On a GPU and in graphs, where a
                look at the values would wait, the loss is then NaN.
        """
        heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not heads:
            raise ValueError("the list of outputs is empty: pass the logits of at least one head")
        for logits in heads:
            check_pair(logits, target, "outputs")
        valid = check_unit(target, "the target", "a mask of 0 and 255 is (mask > 0).float()")
        loss: Any = sum(self._head(logits, target) for logits in heads) / len(heads)
        return loss if valid is None else loss.where(valid, torch.nan)

    def _head(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits if logits.dtype.itemsize >= 4 else logits.float()
        logits, target = logits.flatten(1), target.to(logits.dtype).flatten(1)
        bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(dim=1)
        p = logits.sigmoid()
        dice = (2 * (p * target).sum(dim=1) + self.smooth) / (p.sum(dim=1) + target.sum(dim=1) + self.smooth)
        return (0.5 * bce + 1 - dice).mean()

    def extra_repr(self) -> str:
        return f"smooth={self.smooth}"


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
