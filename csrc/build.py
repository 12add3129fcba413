"""Builds the CUDA kernels into one library for every torch >= 2.10 and every Python: `python csrc/build.py LIBRARY`.

Needs nvcc, a C++ compiler and a torch with its headers, whose own CUDA does not matter. Used by setup.py and the tests.
The environment may set TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX"), MAX_JOBS, CUDA_HOME and CXX.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = ("half.cu", "bfloat16.cu", "tf32.cu", "kernels.cu")
# sm_80 code runs on 8.6 to 8.9 too; PTX serves what comes after.
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]
JOB_BYTES = 2 * 2**30  # memory of one compiler
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the oldest that may load the library


def find_nvcc() -> str | None:
    """The CUDA compiler of CUDA_HOME, else the first of PATH."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def jobs() -> int:
    """Compilers to run at once: MAX_JOBS, else as many as there are cores and memory for."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    try:
        free = int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except OSError:
        free = 4 * JOB_BYTES
    return max(1, min(os.cpu_count() or 1, free // JOB_BYTES))


def architectures(nvcc: str) -> list[str]:
    """nvcc's option for TORCH_CUDA_ARCH_LIST, or for the default list as far as this nvcc knows it."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    known = _output(nvcc, "--list-gpu-code").split()
    found = []
    for name in re.split(r"[;\s]+", (asked or ARCHITECTURES).strip()):
        number = name.removesuffix("+PTX").replace(".", "")
        if not re.fullmatch(r"\d+a?", number) or int(number.rstrip("a")) < 80:
            raise RuntimeError(f"TORCH_CUDA_ARCH_LIST has {name!r}; the kernels need 8.0 or later, such as 8.0;9.0+PTX")
        if asked or f"sm_{number}" in known:
            found += [f"sm_{number}"] + ["compute_80"] * name.endswith("+PTX")
    # Nothing newer than sm_80 is asked for, so one translation serves all.
    return [f"-gencode=arch=compute_80,code=[{','.join(dict.fromkeys(found))}]"]


def commands(nvcc: str, library: Path, folder: Path) -> tuple[list[tuple], list[str]]:
    """(source, object, command) of each piece, and the command that links them."""
    import torch

    torch_path = Path(torch.__file__).parent
    home = Path(nvcc).resolve().parents[1]
    gencode = architectures(nvcc)
    pieces = []
    for name in KERNELS:
        target = folder / f"{name}.o"
        pieces.append(
            (HERE / name, target, [nvcc, *NVCC_FLAGS, *gencode, "-Xcompiler=-fPIC", "-c", HERE / name, "-o", target])
        )
    target = folder / "bindings.o"
    compiler = os.environ.get("CXX", "c++")
    includes = [f"-isystem{path}" for path in (torch_path / "include", home / "include")]
    options = ["-std=c++20", "-O2", "-fPIC", "-DUSE_CUDA", f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *includes]
    source = HERE / "bindings.cpp"
    pieces.append((source, target, [compiler, *options, "-c", source, "-o", target]))
    # libtorch.so brings the parts of torch that are there, the CUDA ones too; their names are looked up when it is loaded.
    objects = [target for _, target, _ in pieces]
    link = [nvcc, "-shared", *objects, "-o", library, f"-L{torch_path / 'lib'}", "-Xlinker=--no-as-needed", "-ltorch"]
    return pieces, [str(part) for part in link]


def build(library: Path, folder: Path) -> Path:
    """Compiles into `folder`, what has changed alone where ninja is there, and links `library`.

    Raises:
        RuntimeError: nvcc is missing, or a compiler failed; with what it said.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("nvcc was not found: install the CUDA toolkit, or set CUDA_HOME")
    folder.mkdir(parents=True, exist_ok=True)
    library.parent.mkdir(parents=True, exist_ok=True)
    pieces, link = commands(nvcc, library, folder)
    if shutil.which("ninja"):
        (folder / "build.ninja").write_text(_ninja(pieces, link, library))
        _output("ninja", "-C", folder, "-j", jobs())
    else:
        with ThreadPoolExecutor(jobs()) as pool:
            list(pool.map(lambda piece: _output(*piece[2]), pieces))
        _output(*link)
    return library


def _ninja(pieces: list[tuple], link: list[str], library: Path) -> str:
    headers = " ".join(str(path) for path in sorted(HERE.glob("*.h")))
    lines = ["rule run", "  command = $what"]
    for source, target, command in pieces:
        lines += [f"build {target}: run {source} | {headers}", f"  what = {' '.join(map(str, command))}"]
    objects = " ".join(str(target) for _, target, _ in pieces)
    return "\n".join([*lines, f"build {library}: run {objects}", f"  what = {' '.join(link)}", ""])


def _output(*command) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{(done.stderr or done.stdout)[-4000:]}")
    return done.stdout


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(build(Path(sys.argv[1]).resolve(), Path(sys.argv[1]).resolve().parent / "objects"))
