"""csrc/build.py, and the tool that lists what nvcc made."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parents[2] / "csrc"


def builder() -> ModuleType:
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("unetpp_fast_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuobjdump() -> str | None:
    """The path of nvcc's, or of Triton's; None if there is neither."""
    triton = importlib.util.find_spec("triton")
    inside = triton and Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return shutil.which("cuobjdump") or (str(inside) if inside and inside.exists() else None)
