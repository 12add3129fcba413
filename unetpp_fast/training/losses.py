"""The paper's loss: binary cross-entropy plus dice, on every head (Zhou et al., 2018, eq. 2)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class BCEDiceLoss(nn.Module):
    """½·BCE + (1 - dice) per image, averaged over the images; for a list of outputs, averaged over the heads.

    For image b with probabilities p = sigmoid(logits) and target y, over its pixels and classes::

        loss_b = ½ mean(-y log p - (1 - y) log(1 - p)) + 1 - (2 sum(p y) + smooth) / (sum(p) + sum(y) + smooth)

    This is eq. 2 with the full cross-entropy (the paper prints only y log p) and with 1 added, so that the loss is not
    negative. It is computed in float32, or in float64 for float64 logits.

    Args:
        smooth: avoids a division by zero for images without foreground.
    """

    def __init__(self, smooth: float = 1e-5):
        super().__init__()
        self.smooth = smooth

    def forward(self, outputs: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """The loss, a scalar, of logits `[N, C, *S]`, or a list of them, and a target of that shape with values in [0, 1].

        Raises:
            ValueError: shapes differ, or the batch is empty.
        """
        heads = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if not heads:
            raise ValueError("the list of outputs is empty: pass the logits of at least one head")
        return sum(self._head(logits, target) for logits in heads) / len(heads)

    def _head(self, logits: Tensor, target: Tensor) -> Tensor:
        check_pair(logits, target, "outputs")
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
