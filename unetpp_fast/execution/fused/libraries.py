"""The compiled libraries, if they were built: the CPU kernels of `csrc/cpu` and the CUDA kernels of `csrc`.

They register `torch.ops.unetpp_fast_cpu` and `torch.ops.unetpp_fast_cuda`.
"""

from __future__ import annotations

import platform
from functools import lru_cache
from pathlib import Path

import torch

from ...kernels import cpu_ops

FOLDER = Path(__file__).parent
SUFFIX = ".dll" if platform.system() == "Windows" else ".so"


@lru_cache
def load(kind: str, folder: Path = FOLDER) -> tuple[bool, str]:
    """Loads the "cpu" or "cuda" library once; whether it is loaded, and if not, why."""
    if kind == "cuda" and torch.version.cuda is None:
        return False, "this torch has no CUDA"
    library = folder / f"unetpp_fast_{kind}{SUFFIX}"
    if not library.exists():
        needs = {"cpu": "a C++ compiler (on Windows, clang++)", "cuda": "nvcc"}[kind]
        return False, f"it was not built: install with UNETPP_FAST_BUILD={kind} where {needs} is, without build isolation"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return False, f"it does not load: {error}"
    return True, ""


def state(kind: str) -> str:
    """One line about a library, for `unetpp_fast.info`."""
    loaded, reason = load(kind)
    if not loaded:
        return f"off: {reason}"
    if kind == "cuda":
        return "loaded"
    tiles = ", matrix tiles for bfloat16" if cpu_ops.matrix_tiles() == "cpu" else ""
    return f"loaded, {4 * 8 * torch.ops.unetpp_fast_cpu.lanes()}-bit vectors{tiles}"
