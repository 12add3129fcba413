"""The module that computes the ops of a fused pass. `kernels/naive.py` defines the contract of all of them."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

from torch import Tensor

from ...kernels import cpu_ops, naive

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # kernels run in Triton's interpreter, on the CPU


def load_ops(name: str) -> ModuleType:
    """The module with the ops: "naive" (plain PyTorch, any device), "cpu", "triton" or "cuda" (see `dispatch.can_run_*`).

    Raises:
        ModuleNotFoundError: Triton is not installed.
    """
    if name == "triton":
        from ...kernels import triton_ops  # not at the top: Triton is optional

        return triton_ops
    if name == "cuda":
        from ...kernels import cuda_ops

        return cuda_ops
    if name in ("naive", "cpu"):
        return {"naive": naive, "cpu": cpu_ops}[name]
    raise ValueError(f"no ops are called {name!r}: naive, cpu, triton or cuda")


def composes(name: str) -> bool:
    """Whether the weights of a pass with these ops are composed by a kernel (`composed.py`)."""
    return name in ("triton", "cuda")


def takes_views(ops: ModuleType) -> bool:
    """Whether the convolutions take weights of any strides; else they must be contiguous."""
    return ops is cpu_ops


def read(ops: ModuleType, x: Tensor, affine: naive.Affine | None, slope: float) -> Tensor:
    """`naive.read`, by the kernel of ops that have one."""
    return getattr(ops, "read", naive.read)(x, affine, slope)


def reads_linear(ops: ModuleType) -> bool:
    """Whether the convolutions up-sample a low source linearly as they read it; else it is up-sampled beforehand."""
    return ops in (cpu_ops, naive)
