"""Builds the kernels into libraries for every torch >= 2.10 and every Python: `python csrc/build.py cpu|cuda LIBRARY`.

The CPU kernels need a C++17 compiler: GCC or Clang, on Windows Clang with the headers and libraries of Visual Studio. The
CUDA kernels need nvcc too, and another system than Windows. Both need a torch with its headers, whose own CUDA does not
matter. Used by setup.py and the tests. The environment may set CXX, MAX_JOBS and, for CUDA, CUDA_HOME and
TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX").
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
KERNELS = ("half.cu", "bfloat16.cu", "tf32.cu", "kernels.cu")
# sm_80 code runs on 8.6 to 8.9 too; PTX serves later GPUs.
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
CPU_FLAGS = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fvisibility=hidden"]
# The CPU kernels are compiled once per instruction set; the library chooses when it is loaded.
INSTRUCTION_SETS = {
    "plain": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
}
MATRIX_TILES = ["-mamx-tile", "-mamx-bf16"]  # beside avx512, of compilers that know them
JOB_BYTES = 2 * 2**30  # memory of one compiler
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest that may load the library

Piece = tuple[Path, Path, list]  # source, object, command


class System(NamedTuple):
    """What differs between operating systems."""

    compiler: str  # of C++, unless CXX names another
    install: str  # what to do where there is none
    suffix: str  # of a library's name
    compile: list[str]
    link: list[str]


def system() -> System:
    """This one. On Windows the library throws its errors through torch and frees what torch has allocated, so it takes the
    runtime of Visual Studio that torch takes; of the compilers for that, only Clang knows the vectors of the kernels."""
    if platform.system() != "Windows":
        return System("c++", "install g++ or clang, or set CXX", ".so", ["-fPIC"], [])
    target = f"--target={'aarch64' if platform.machine().lower() == 'arm64' else 'x86_64'}-pc-windows-msvc"
    # Clang links the static runtime to whatever it is not told to link itself: the objects name the one that torch uses.
    link = [target, "-fuse-ld=lld", "-nostartfiles", "-nostdlib", "-lkernel32"]
    install = "install LLVM (winget install LLVM.LLVM) and the C++ tools of Visual Studio, or set CXX to a clang++"
    return System("clang++", install, ".dll", [target, "-fms-runtime-lib=dll"], link)


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else the first of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def find_compiler() -> str | None:
    """The C++ compiler that CXX names, else the first of PATH."""
    return shutil.which(os.environ.get("CXX", system().compiler))


def jobs() -> int:
    """Compilers to run at once: MAX_JOBS, else as many as cores and memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))[1]) * 1024
    except OSError:
        free = 4 * JOB_BYTES
    return max(1, min(os.cpu_count() or 1, free // JOB_BYTES))


def architectures(nvcc: str) -> list[str]:
    """nvcc's option for TORCH_CUDA_ARCH_LIST, or for the default list as far as this nvcc knows it."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = _output(nvcc, "--list-gpu-code").split()
    codes = []
    for name in re.split(r"[;\s]+", (asked or ARCHITECTURES).strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+a?", number) or int(number.rstrip("a")) < 80:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {name!r}; the kernels need 8.0 or later, such as 8.0;9.0+PTX")
        if asked or f"sm_{number}" in known:
            codes.append(f"sm_{number}")
        if name.endswith("+PTX"):  # also for a GPU that this nvcc does not know
            codes.append("compute_80")
    # Nothing newer than sm_80 is used, so one translation serves all.
    return [f"-gencode=arch=compute_80,code=[{','.join(dict.fromkeys(codes))}]"]


def _torch() -> Path:
    """The folder of torch, which is not imported: it may be one for another processor."""
    return Path(importlib.util.find_spec("torch").origin).parent


def machine(compiler: str) -> str:
    """The processor that a compiler compiles for, such as "x86_64" or "aarch64"; this machine's if it does not say."""
    done = subprocess.run([compiler, "-dumpmachine"], capture_output=True)
    told = done.stdout.decode("utf-8", "replace") if done.returncode == 0 else ""
    return told.partition("-")[0].strip() or platform.machine().lower()


def _bindings(source: Path, folder: Path, *options: str) -> Piece:
    target = folder / "bindings.o"
    flags = ["-std=c++20", "-O2", *system().compile, f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *options]
    return source, target, [find_compiler(), *flags, f"-isystem{_torch() / 'include'}", "-c", source, "-o", target]


def cuda_commands(library: Path, folder: Path) -> tuple[list[Piece], list[str]]:
    """The pieces of the CUDA library, and the command that links them.

    Raises:
        RuntimeError: nvcc is missing, or this is Windows.
    """
    if platform.system() == "Windows":
        raise RuntimeError("the CUDA kernels are not built on Windows, where nobody has tried them")
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME")
    gencode = architectures(nvcc)
    pieces = []
    for name in KERNELS:
        target = folder / f"{name}.o"
        pieces.append(
            (HERE / name, target, [nvcc, *NVCC_FLAGS, *gencode, "-Xcompiler=-fPIC", "-c", HERE / name, "-o", target])
        )
    include = f"-isystem{Path(nvcc).resolve().parents[1] / 'include'}"
    pieces.append(_bindings(HERE / "bindings.cpp", folder, "-DUSE_CUDA", include))
    # libtorch.so loads the parts of torch that exist, the CUDA ones too; their symbols are resolved at load time.
    objects = [target for _, target, _ in pieces]
    link = [nvcc, "-shared", *objects, "-o", library, f"-L{_torch() / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"]
    return pieces, [str(part) for part in link]


def _takes(compiler: str, options: list[str]) -> bool:
    """Whether a compiler knows these options, and its assembler the instructions of matrix tiles."""
    command = [compiler, *options, "-x", "c++", "-c", "-", "-o", os.devnull]
    source = 'void release() { __asm__("tilerelease"); }'
    return subprocess.run(command, input=source.encode(), capture_output=True).returncode == 0


def cpu_commands(library: Path, folder: Path, extra: tuple[str, ...] = ()) -> tuple[list[Piece], list[str]]:
    """The pieces of the CPU library, and the command that links them; `extra` flags go to every compiler.

    Raises:
        RuntimeError: there is no C++ compiler.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError(f"no C++ compiler was found: {system().install}")
    here = HERE / "cpu"
    names = INSTRUCTION_SETS if machine(compiler) in ("x86_64", "amd64") else ("plain",)
    pieces = []
    for name in names:
        target = folder / f"{name}.o"
        options = [*CPU_FLAGS, *system().compile, *INSTRUCTION_SETS[name], *extra]
        if name == "avx512" and _takes(compiler, [*system().compile, *MATRIX_TILES]):
            options += MATRIX_TILES
        pieces.append((here / f"{name}.cpp", target, [compiler, *options, "-c", here / f"{name}.cpp", "-o", target]))
    pieces.append(_bindings(here / "bindings.cpp", folder, *extra))
    objects = [target for _, target, _ in pieces]
    libraries = [f"-L{_torch() / 'lib'}", "-ltorch", "-ltorch_cpu"]
    link = [compiler, "-shared", *system().link, *extra, *objects, "-o", library, *libraries]
    return pieces, [str(part) for part in link]


def build(kind: str, library: Path, folder: Path, extra: tuple[str, ...] = ()) -> Path:
    """Compiles the "cpu" or "cuda" kernels into `folder`, only what has changed if ninja is installed, and links `library`.

    Raises:
        RuntimeError: a compiler is missing or failed; with its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    pieces, link = cuda_commands(library, folder) if kind == "cuda" else cpu_commands(library, folder, extra)
    if shutil.which("ninja"):
        (folder / "build.ninja").write_text(_ninja(pieces, link, library), encoding="utf-8")
        _output("ninja", "-C", folder, "-j", jobs())
    else:
        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(lambda piece: _output(*piece[2]), pieces))
        _output(*link)
    return library


def _ninja(pieces: list[Piece], link: list[str], library: Path) -> str:
    def line(command: list) -> str:
        parts = [str(part) for part in command]
        return (subprocess.list2cmdline(parts) if os.name == "nt" else shlex.join(parts)).replace("$", "$$")

    def files(*paths: Path) -> str:
        return " ".join(re.sub(r"[$: ]", r"$\g<0>", str(path)) for path in paths)

    headers = files(*sorted(HERE.rglob("*.h")))
    lines = ["rule run", "  command = $what"]
    for source, target, command in pieces:
        lines += [f"build {files(target)}: run {files(source)} | {headers}", f"  what = {line(command)}"]
    objects = files(*(target for _, target, _ in pieces))
    return "\n".join([*lines, f"build {files(library)}: run {objects}", f"  what = {line(link)}", ""])


def _output(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("cpu", "cuda"):
        sys.exit(__doc__)
    print(build(sys.argv[1], Path(sys.argv[2]).resolve(), Path(sys.argv[2]).resolve().parent / "objects"))
