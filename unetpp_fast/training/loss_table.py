"""The losses that `unetpp-fast train --loss` knows by name. One with an attribute `exclusive` takes one-hot targets of
classes that exclude each other; `Trainer` then chooses the largest logit and scores every class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import InputError, first_line
from .exclusive import CrossEntropyDiceLoss
from .losses import BCEDiceLoss, ClassWeighted
from .weighted_losses import DeepSupervision, FocalLoss, TverskyLoss

PROBED = 32  # pixels a side

# By name: of classes that may overlap, and of classes that exclude one another; None if there is none.
LOSSES: dict[str, tuple[Callable[..., nn.Module] | None, Callable[..., nn.Module] | None]] = {
    "bce-dice": (BCEDiceLoss, None),
    "ce-dice": (None, CrossEntropyDiceLoss),
    "ce": (None, partial(CrossEntropyDiceLoss, dice=0.0)),
    "focal": (FocalLoss, partial(FocalLoss, exclusive=True)),
    "tversky": (TverskyLoss, partial(TverskyLoss, exclusive=True)),
}


def is_exclusive(loss: nn.Module) -> bool:
    """Whether the classes of a loss exclude each other."""
    return bool(getattr(loss, "exclusive", False))


def taking_lists(loss: nn.Module, classes: int, like: Tensor, spatial_dims: int) -> nn.Module:
    """A loss that takes the list of every head's logits: this one, or if it takes only single logits, its mean over
    the heads.

    like: a tensor of the device and precision of the network.

    Raises:
        InputError: it takes neither.
    """
    if isinstance(loss, (ClassWeighted, DeepSupervision)):
        return loss
    logits = like.new_zeros(1, classes, *[PROBED] * spatial_dims)
    mask = torch.zeros_like(logits)
    mask[:, 0] = 1
    try:
        with torch.no_grad():
            if isinstance(loss([logits], mask), Tensor):
                return loss
    except Exception:  # of whatever kind: it takes no lists
        pass
    try:
        with torch.no_grad():
            loss(logits, mask)
    except Exception as error:
        what = f"the loss {type(loss).__name__} takes no logits and masks [N, {classes}, *S], alone or in a list"
        raise InputError(f"{what}: {first_line(error)}") from error
    return DeepSupervision(loss)


def choose_loss(
    name: str | None,
    exclusive: bool,
    *,
    weights: Sequence[float] | None = None,
    background: bool = True,
    head_weights: str = "equal",
) -> nn.Module:
    """The loss of that name, or the default for masks (bce-dice) or label maps (ce-dice).

    Args:
        weights: of the classes; None: they count alike.
        background: whether class 0 of label maps counts (in ce-dice: in the dice term).
        head_weights: see `DeepSupervision`.

    Raises:
        InputError: the loss is for the other kind of data, or an option does not fit.
    """
    make = LOSSES[name or ("ce-dice" if exclusive else "bce-dice")][exclusive]
    if make is None:
        have = "label maps: their classes exclude each other" if exclusive else "masks: their classes may overlap"
        fitting = [name for name, makes in LOSSES.items() if makes[exclusive]]
        raise InputError(f"--loss {name} does not fit {have}; use {', '.join(fitting[:-1])} or {fitting[-1]}")
    options: dict[str, Any] = {} if weights is None else {"weights": weights}
    if not background:
        if not exclusive:
            raise InputError("--no-background is for label maps: masks hold no background class")
        if name == "ce":
            raise InputError(
                "--no-background does not go with --loss ce, which counts every pixel: use ce-dice, focal, tversky"
            )
        options["background"] = False
    loss = make(**options)
    return loss if head_weights == "equal" else DeepSupervision(loss, head_weights)
