"""The CPU kernels' sources as Clang reads them, for this system and for Windows: GCC takes what Clang does not, and a `long`
of Windows has 32 bits. Only where there is a Clang, and for Windows the headers of MinGW (g++-mingw-w64)."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CLANG = next(filter(None, map(shutil.which, ["clang++", *(f"clang++-{number}" for number in range(30, 13, -1))])), None)
HEADERS = Path("/usr/x86_64-w64-mingw32/include")
TARGETS = {"here": [], "Windows": ["--target=x86_64-w64-windows-gnu"]}
pytestmark = pytest.mark.skipif(
    CLANG is None or platform.machine() != "x86_64" or platform.system() != "Linux",
    reason="there is no Clang for x86 on Linux",
)


def commands() -> dict[str, list[str]]:
    """The compiler's options for each source, without those of one system."""
    spec = importlib.util.spec_from_file_location("unetpp_fast_build", ROOT / "csrc" / "build.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    headers, version = Path(torch.__file__).parent / "include", builder.TORCH_TARGET_VERSION
    bindings = ["-std=c++20", f"-isystem{headers}", f"-DTORCH_TARGET_VERSION={version}"]
    sets = {name: [*builder.CPU_FLAGS, *flags] for name, flags in builder.INSTRUCTION_SETS.items()}
    sets["avx512"] += builder.MATRIX_TILES
    return {**sets, "bindings": bindings}


@pytest.mark.parametrize("source", ["plain", "avx2", "avx512", "bindings"])
@pytest.mark.parametrize("target", TARGETS)
def test_clang_takes_it(source, target):
    if target == "Windows" and not HEADERS.is_dir():
        pytest.skip("there are no headers for Windows (g++-mingw-w64)")
    command = [CLANG, *TARGETS[target], *commands()[source], "-fsyntax-only", ROOT / "csrc" / "cpu" / f"{source}.cpp"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
