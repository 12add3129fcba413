"""The forms in which a network returns the logits of its heads: ours, or that of the model it was converted from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

Outputs = Tensor | list[Tensor] | tuple[Tensor, ...]


def plain(logits: Sequence[Tensor], several: bool) -> Outputs:
    """A list, X(0,1) first, with deep supervision, else the deepest head's tensor."""
    return list(logits) if several else logits[-1]


def always_list(logits: Sequence[Tensor], several: bool) -> list[Tensor]:
    """A list, X(0,1) first; without deep supervision a list of the deepest head only (MONAI)."""
    return list(logits) if several else [logits[-1]]


def deepest_first(logits: Sequence[Tensor], several: bool) -> Outputs:
    """A tuple, X(0,1) last, with deep supervision, else the deepest head's tensor (nnU-Net++)."""
    return tuple(reversed(logits)) if several else logits[-1]


def sigmoid(logits: Sequence[Tensor], several: bool) -> Outputs:
    """As `plain`, each map through a sigmoid (UNET-ZOO, the paper's Keras code)."""
    return plain([head.sigmoid() for head in logits], several)


def softmax(logits: Sequence[Tensor], several: bool) -> Outputs:
    """As `plain`, each map through a softmax over the classes."""
    return plain([head.softmax(dim=1) for head in logits], several)


def softmax_deepest_first(logits: Sequence[Tensor], several: bool) -> Outputs:
    """As `deepest_first`, each map through a softmax over the classes (nnU-Net++ with its final non-linearity)."""
    return deepest_first([head.softmax(dim=1) for head in logits], several)


FORMS: dict[str, Callable[[Sequence[Tensor], bool], Outputs]] = {
    form.__name__: form for form in (plain, always_list, deepest_first, sigmoid, softmax, softmax_deepest_first)
}


def check_form(name: str) -> str:
    """`name` if there is a form of that name, else a ValueError that lists the names."""
    if name not in FORMS:
        raise ValueError(f"form={name!r} is not known: use one of {sorted(FORMS)}")
    return name
