"""The precisions of maps, in one table by their names in torch ("float32", "bfloat16"), and that of a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..common.errors import InputError

_NO_FLOAT64 = "the kernels compute in float32, float16 and bfloat16, not torch.float64"
_CPU = "the CPU backend computes in float32 and bfloat16, not"


@dataclass(frozen=True)
class Precision:
    """dtype: of the maps. training: whether `Recipe` and records accept it. half: whether it is reached by autocast, with
    weights in float32. unsupported: by backend, why it cannot compute in this precision."""

    dtype: torch.dtype
    training: bool = True
    half: bool = False
    unsupported: Mapping[str, str] = field(default_factory=dict)


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16, half=True),
    "float16": Precision(torch.float16, half=True, unsupported={"cpu": f"{_CPU} torch.float16"}),
    "float64": Precision(
        torch.float64,
        training=False,
        unsupported={"triton": _NO_FLOAT64, "cuda": _NO_FLOAT64, "cpu": f"{_CPU} torch.float64"},
    ),
}
TRAINED = tuple(name for name, precision in PRECISIONS.items() if precision.training)


def precision_of(dtype: torch.dtype) -> Precision | None:
    """The entry of a dtype, None if the table has none."""
    return PRECISIONS.get(str(dtype).removeprefix("torch."))


def unsupported_dtype(dtype: torch.dtype, backend: str) -> str:
    """Why a backend other than the reference cannot compute maps of `dtype`; "" if it can."""
    precision = precision_of(dtype)
    return (
        f"no backend but the reference computes in {dtype}" if precision is None else precision.unsupported.get(backend, "")
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The precision of the maps: autocast's if it is enabled, otherwise the input's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def autocast_dtype(name: str) -> torch.dtype | None:
    """None for "float32" (no autocast), else the half-precision dtype.

    Raises:
        InputError: networks cannot be trained in this precision.
    """
    if name not in TRAINED:
        raise InputError(f"dtype must be one of {', '.join(TRAINED)}, not {name!r}")
    return PRECISIONS[name].dtype if PRECISIONS[name].half else None


def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """The context for a forward pass in `dtype`."""
    half = autocast_dtype(dtype)
    return torch.autocast(device.type, half) if half else nullcontext()


def choose_dtype(name: str, device: torch.device) -> str:
    """`name`; for "auto", bfloat16 on a GPU that supports it and float32 elsewhere."""
    if name != "auto":
        return name
    return "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, convolutions on a GPU multiply float32 as float32: for comparisons, which TF32's rounding would blur."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before, convolutions.fp32_precision = convolutions.fp32_precision, "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
