"""The library of the CUDA kernels in `csrc/`, if it was built; it registers `torch.ops.unetpp_fast_cuda`."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parent / "unetpp_fast_cuda.so"


@lru_cache
def load(library: Path = LIBRARY) -> tuple[bool, str]:
    """Loads the library once; whether it is loaded, and if not, why."""
    if torch.version.cuda is None:
        return False, "this torch has no CUDA"
    if not library.exists():
        return False, "it was not built: install with UNETPP_FAST_BUILD=cuda where nvcc is, without build isolation"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return False, f"it does not load: {error}"
    return True, ""


def state() -> str:
    """One line about the library, for `unetpp_fast.info`."""
    loaded, reason = load()
    return "CUDA kernels loaded" if loaded else f"off: {reason}"
