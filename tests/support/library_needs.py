"""What a compiled library needs of others, by binutils."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

# The parts of glibc, libgcc and libstdc++: every manylinux has them. auditwheel says how new theirs may be.
SYSTEM = re.compile(r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so\.\d|ld-linux[-\w]*\.so\.\d")
VERSIONS = re.compile(r"@(GLIBC|GCC|GLIBCXX|CXXABI)_[\d.]+")
STABLE = re.compile(r"(aoti_)?torch_\w+")
MAY_BE_MISSING = ("__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable")
TORCH = ("libtorch.so", "libtorch_cpu.so", "libc10.so")  # as in the Makefile


def symbols(library: Path) -> list[str]:
    """The names of functions and data that the library takes from others, with their versions."""
    return [line.split()[-1] for line in _lines("nm", "-D", "--undefined-only", library)]


def foreign_symbols(library: Path) -> list[str]:
    """Those of `symbols` that neither torch's stable ABI nor the system promises."""
    names = [name for name in symbols(library) if name not in MAY_BE_MISSING]
    return [name for name in names if not (STABLE.fullmatch(name) or VERSIONS.search(name))]


def foreign_libraries(library: Path) -> list[str]:
    """The libraries that it needs besides torch's and the system's."""
    found = [re.search(r"\(NEEDED\).*\[(.+)\]", line) for line in _lines("readelf", "-d", "-W", library)]
    return [line[1] for line in found if line and line[1] not in TORCH and not SYSTEM.fullmatch(line[1])]


def _lines(*command: str | Path) -> list[str]:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
