"""When a result counts as right: as near to float64 as twice PyTorch's own error in that precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SINGLE = 1e-5  # of the norm: what another order of summation may cost in single precision


def disagreement(exact: Sequence[Tensor], usual: Sequence[Tensor], found: Sequence[Tensor], dtype: torch.dtype) -> str:
    """Why a result is not as near to float64 as it must be; "" where it is.

    For each pair of vectors (outputs, gradients): ``|found - exact| <= 2 |usual - exact| + eps |exact|``, in Euclidean
    norms; `usual` is what PyTorch gives in that precision. In float32, 1e-5 of the norm is right too.
    """
    for index, (e, u, f) in enumerate(zip(exact, usual, found, strict=True)):
        what = ("outputs", "gradients")[index] if len(exact) <= 2 else f"result {index}"
        if f.shape != e.shape:
            return f"{what} are {f.numel()} values, not {e.numel()}"
        error, allowed = (f - e).norm(), 2 * (u - e).norm() + torch.finfo(dtype).eps * e.norm()
        if dtype == torch.float32:
            allowed = max(allowed, SINGLE * e.norm())
        if not bool(error <= allowed):  # NaN too
            return f"{what} are {error:.3g} off float64, allowed are {allowed:.3g} (of {e.norm():.3g})"
    return ""


def as_vector(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one float64 vector."""
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])
