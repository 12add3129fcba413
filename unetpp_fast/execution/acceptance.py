"""When a result is accepted: within twice PyTorch's own error against float64 in that precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SINGLE = 1e-5  # relative error that another order of summation may cause in single precision


def disagreement(exact: Sequence[Tensor], usual: Sequence[Tensor], actual: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Why a result is not accepted; "" if it is.

    For each pair of vectors (outputs, gradients): ``|actual - exact| <= 2 |usual - exact| + eps |exact|``, in Euclidean
    norms; `usual` is PyTorch's own result in that precision. In float32 a relative error of 1e-5 is accepted too.
    """
    for index, (e, u, a) in enumerate(zip(exact, usual, actual, strict=True)):
        what = ("outputs", "gradients")[index] if len(exact) <= 2 else f"result {index}"
        if a.shape != e.shape:
            return f"{what} are {a.numel()} values, not {e.numel()}"
        error, allowed = (a - e).norm(), 2 * (u - e).norm() + torch.finfo(dtype).eps * e.norm()
        if dtype == torch.float32:
            allowed = max(allowed, SINGLE * e.norm())
        if not bool(error <= allowed):  # NaN too
            return f"{what} are {error:.3g} off float64, allowed are {allowed:.3g} (norm {e.norm():.3g})"
    return ""


def farther_off(exact: Sequence[Tensor], *candidates: Sequence[Tensor]) -> list[Tensor]:
    """Of several results of PyTorch's own, each as a list like `exact`, for each vector the one that is farther off: by how
    much gradients are off depends on which ReLUs and maxima happen to fall the other way."""
    return [max(vectors, key=lambda v, e=e: float((v - e).norm())) for *vectors, e in zip(*candidates, exact, strict=True)]


def as_vector(tensors: Sequence[Tensor]) -> Tensor:
    """The values of all tensors as one float64 vector."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])
