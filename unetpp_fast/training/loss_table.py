"""The losses that `unetpp-fast train --loss` knows by name. One with an attribute `exclusive` takes one-hot targets of
classes that exclude each other; `Trainer` then chooses the largest logit and scores every class."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from ..common.errors import InputError
from .exclusive import CrossEntropyDiceLoss
from .losses import BCEDiceLoss

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "bce-dice": BCEDiceLoss,
    "ce-dice": CrossEntropyDiceLoss,
    "ce": partial(CrossEntropyDiceLoss, dice=0.0),
}


def is_exclusive(loss: nn.Module) -> bool:
    """Whether the classes of a loss exclude each other."""
    return bool(getattr(loss, "exclusive", False))


def choose_loss(name: str | None, exclusive: bool) -> nn.Module:
    """The loss of that name, or the default for masks (bce-dice) or label maps (ce-dice).

    Raises:
        InputError: the loss is for the other kind of data.
    """
    loss = LOSSES[name or ("ce-dice" if exclusive else "bce-dice")]()
    if is_exclusive(loss) != exclusive:
        have = "label maps: their classes exclude each other" if exclusive else "masks: their classes may overlap"
        fitting = [name for name, make in LOSSES.items() if is_exclusive(make()) == exclusive]
        raise InputError(f"--loss {name} does not fit {have}; use {' or '.join(fitting)}")
    return loss
