"""The losses that `unetpp-fast train --loss` knows by name. One with an attribute `exclusive` takes one-hot targets of
classes that exclude each other; `Trainer` then chooses the largest logit and scores every class."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from ..common.errors import InputError
from .exclusive import CrossEntropyDiceLoss
from .losses import BCEDiceLoss
from .weighted_losses import DeepSupervision, FocalLoss, TverskyLoss

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
