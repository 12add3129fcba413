"""The libraries that are installed with the package need nothing but torch's stable ABI and the system, load, and have code
for every GPU that they are meant for.

A release runs this against its wheels, where what UNETPP_FAST_BUILD asked for has to be there ([tool.cibuildwheel]).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.csrc import builder, cuobjdump
from support.library_needs import foreign_libraries, foreign_symbols, symbols

from unetpp_fast.execution.fused import libraries

ASKED = {"cpu": ["cpu"], "cuda": ["cpu", "cuda"]}.get(os.environ.get("UNETPP_FAST_BUILD", ""), [])
BUILT = [kind for kind in ("cpu", "cuda") if (libraries.FOLDER / f"unetpp_fast_{kind}{libraries.SUFFIX}").exists()]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
LISTED = sys.platform == "linux" and shutil.which("nm") and shutil.which("readelf")
needs_binutils = pytest.mark.skipif(not LISTED, reason="listing what a library needs takes nm and readelf")


def path(kind: str) -> Path:
    return libraries.FOLDER / f"unetpp_fast_{kind}{libraries.SUFFIX}"


def test_what_was_asked_for_is_there():
    assert not set(ASKED) - set(BUILT)


@needs_binutils
@pytest.mark.parametrize("kind", BUILT)
def test_a_library_needs_the_stable_abi_and_the_system_alone(kind):
    assert foreign_symbols(path(kind)) == []
    assert foreign_libraries(path(kind)) == []
    assert "torch_library_impl" in symbols(path(kind))


@pytest.mark.parametrize("kind", BUILT)
def test_a_library_loads_or_says_in_a_line_why_not(kind):
    loaded, reason = libraries.load(kind)
    if kind == "cuda" and torch.version.cuda is None:
        assert (loaded, reason) == (False, "this torch has no CUDA")
    else:
        assert loaded, reason


@pytest.mark.skipif("cuda" not in ASKED, reason="only of a library with the code for all GPUs")
def test_the_cuda_library_has_code_for_every_gpu_of_a_release():
    """As much for each, and the translation for later ones."""
    numbers = [name.removesuffix("+PTX").replace(".", "") for name in builder().ARCHITECTURES.split(";")]
    listed = subprocess.run([cuobjdump(), "-lelf", "-lptx", path("cuda")], check=True, capture_output=True, text=True).stdout
    codes = Counter(re.findall(r"\.sm_(\d+)\.cubin", listed))
    translations = len(re.findall(r"\.ptx", listed))
    assert translations and [codes[number] for number in numbers] == [translations] * len(numbers)


@needs_binutils
@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
@pytest.mark.parametrize(
    ("declaration", "name"),
    [
        ("namespace c10 { int version(); } int taken() { return c10::version(); }", "_ZN3c107versionEv"),
        ('extern "C" int cudaGetDevice(int*); int taken() { int at; return cudaGetDevice(&at); }', "cudaGetDevice"),
        ("namespace at { extern int threads; } int taken() { return at::threads; }", "_ZN2at7threadsE"),
    ],
)
def test_what_is_not_promised_is_noticed(declaration, name, tmp_path: Path):
    """A symbol of torch's C++ or of the CUDA runtime; the library that has it, too."""
    other, library = tmp_path / "libother.so.1", tmp_path / "library.so"
    for source, target, options in (
        ("int other() { return 0; }", other, []),
        (declaration, library, ["-Wl,--no-as-needed", other]),
    ):
        command = [COMPILER, "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", *options, "-o", target]
        subprocess.run([str(part) for part in command], input=source, text=True, check=True)
    assert foreign_symbols(library) == [name]
    assert foreign_libraries(library) == [str(other)]
