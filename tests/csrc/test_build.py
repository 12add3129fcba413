"""How setup.py decides whether to build the kernels of csrc/; `test_cpu_library.py` and `test_sass.py` build them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import csrc

import unetpp_fast as uf
from unetpp_fast.execution import dispatch
from unetpp_fast.execution.call import Call

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def builder():
    return csrc.builder()


def setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def without_nvcc(folder: Path) -> dict[str, str]:
    return {"CUDA_HOME": str(folder)}


def without_compilers(folder: Path) -> dict[str, str]:
    return {**without_nvcc(folder), "PATH": str(folder)}


def test_auto_says_in_a_line_for_each_kind_why_it_does_not_build(tmp_path: Path):
    done = setup("--name", UNETPP_FAST_BUILD="auto", **without_compilers(tmp_path))
    assert done.returncode == 0 and done.stdout.strip() == "unetpp_fast"
    assert done.stderr.splitlines()[-2:] == [
        "unetpp_fast: the CPU kernels are not built, there is no C++ compiler; PyTorch's operators serve instead",
        "unetpp_fast: the CUDA kernels are not built, there is no nvcc; Triton's serve instead",
    ]


def test_auto_goes_on_where_a_compiler_fails(tmp_path: Path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    compiler.chmod(0o755)
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    done = setup("build_ext", *folders, UNETPP_FAST_BUILD="auto", CXX=str(compiler), **without_nvcc(tmp_path))
    assert done.returncode == 0 and "the CPU kernels are not built, a compiler failed" in done.stderr
    assert not list((tmp_path / "lib").rglob("*.so"))


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_auto_does_not_build_for_a_torch_without_cuda(tmp_path: Path):
    compiler = tmp_path / "bin" / "nvcc"
    compiler.parent.mkdir()
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    done = setup("--name", UNETPP_FAST_BUILD="auto", CUDA_HOME=str(tmp_path))
    assert done.returncode == 0 and f"torch {torch.__version__} has no CUDA" in done.stderr


def test_none_is_silent(tmp_path: Path):
    assert "kernels" not in setup("--name", UNETPP_FAST_BUILD="none", **without_compilers(tmp_path)).stderr


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cpu", "no C++ compiler was found: install g++ or clang, or set CXX"),
        ("cuda", "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME"),
    ],
)
def test_what_was_asked_for_fails_loudly_without_its_compiler(builder, kind, message, tmp_path: Path, monkeypatch):
    for name, value in without_compilers(tmp_path).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        builder.build(kind, tmp_path / "library.so", tmp_path / "objects")
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    assert setup("build_ext", *folders, UNETPP_FAST_BUILD=kind).returncode != 0


@pytest.mark.parametrize(("says", "names"), [("aarch64-linux-gnu", 1), ("x86_64-linux-gnu", 3), ("", 1)])
def test_the_compiler_says_for_which_processor(says, names, builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cross compiler, for another one than this; PYTHONPATH leads to that one's torch, which cannot be imported here."""
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho {says}\n")
    compiler.chmod(0o755)
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('of another processor')")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(builder.platform, "machine", lambda: "aarch64")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    pieces, link = builder.cpu_commands(tmp_path / "library.so", tmp_path)
    assert len(pieces) == names + 1 and f"-L{tmp_path / 'torch' / 'lib'}" in link


def windows(builder, monkeypatch: pytest.MonkeyPatch, machine: str = "AMD64") -> None:
    monkeypatch.setattr(builder.platform, "system", lambda: "Windows")
    monkeypatch.setattr(builder.platform, "machine", lambda: machine)


@pytest.mark.parametrize(("machine", "target"), [("AMD64", "x86_64"), ("ARM64", "aarch64")])
def test_commands_for_windows(machine, target, builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By clang++ for Visual Studio's C++, with the runtime library that torch shares; against torch's import library."""
    windows(builder, monkeypatch, machine)
    compiler = tmp_path / "clang++"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    pieces, link = builder.cpu_commands(tmp_path / "unetpp_fast_cpu.dll", tmp_path)
    commands = {source.name: command for source, _, command in pieces}
    assert set(commands) == {"plain.cpp", "bindings.cpp"} | ({"avx2.cpp", "avx512.cpp"} if target == "x86_64" else set())
    for command in commands.values():
        assert {f"--target={target}-pc-windows-msvc", "-fms-runtime-lib=dll"} < set(command) and "-fPIC" not in command
        assert command[0] == str(compiler)
    assert {f"--target={target}-pc-windows-msvc", "-fuse-ld=lld", "-nostdlib", "-ltorch_cpu"} < set(link)
    assert link[0] == str(compiler) and link[link.index("-o") + 1].endswith(".dll")
    assert builder.system().suffix == ".dll"


def test_windows_without_clang(builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """g++ or cl on PATH do not count; CUDA is said not to be there."""
    windows(builder, monkeypatch)
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler was found: install LLVM .* or set CXX to a clang\+\+$"):
        builder.cpu_commands(tmp_path / "unetpp_fast_cpu.dll", tmp_path)
    with pytest.raises(RuntimeError, match="not built on Windows"):
        builder.cuda_commands(tmp_path / "unetpp_fast_cuda.dll", tmp_path)


@pytest.mark.skipif(not shutil.which("ninja"), reason="ninja is not installed")
def test_ninja_takes_paths_of_any_kind(builder, tmp_path: Path):
    """Spaces, as in C:\\Program Files, colons and dollars; a second run has nothing to do."""
    folder = tmp_path / "a b:c$d"
    folder.mkdir()
    copy = "import shutil, sys; shutil.copy(*sys.argv[1:])"
    source, target, library = folder / "in.cpp", folder / "in.o", folder / "lib.so"
    source.write_text("text")
    pieces = [(source, target, [sys.executable, "-c", copy, source, target])]
    link = [sys.executable, "-c", copy, str(target), str(library)]
    (tmp_path / "build.ninja").write_text(builder._ninja(pieces, link, library))
    builder._output("ninja", "-C", tmp_path)
    assert library.read_text() == "text"
    assert "no work to do" in builder._output("ninja", "-C", tmp_path)


def test_another_mode_is_refused():
    done = setup("--name", UNETPP_FAST_BUILD="maybe")
    assert done.returncode != 0 and "UNETPP_FAST_BUILD is auto, cuda, cpu or none, not 'maybe'" in done.stderr


def test_architectures(builder, monkeypatch: pytest.MonkeyPatch):
    """The requested architectures, else the defaults that the compiler knows; none older than the kernels' instructions."""
    monkeypatch.setattr(builder, "_output", lambda *command: "sm_80\nsm_90\n")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert builder.architectures("nvcc") == ["-gencode=arch=compute_80,code=[sm_80,sm_90,compute_80]"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 12.0+PTX")
    assert builder.architectures("nvcc") == ["-gencode=arch=compute_80,code=[sm_86,sm_120,compute_80]"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    with pytest.raises(RuntimeError, match=r"TORCH_CUDA_ARCH_LIST has '7.5'"):
        builder.architectures("nvcc")


def test_jobs(builder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert builder.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    assert 1 <= builder.jobs() <= (os.cpu_count() or 1)
    monkeypatch.setattr(builder, "JOB_BYTES", 2**60)
    assert builder.jobs() == 1


def test_the_backend_says_why_it_is_off(monkeypatch: pytest.MonkeyPatch):
    """The reference runs instead; a torch without CUDA is named as the reason if it is the only one."""
    model, x = uf.UNetPlusPlus(1, 1, features=(4, 8), backend="cuda").eval(), torch.rand(1, 1, 4, 6)
    name, reason = dispatch.choose(Call(model, x))
    assert name == "reference" and reason
    expected = model(x)
    model.backend = "reference"
    assert torch.equal(model(x), expected)
    monkeypatch.setattr(dispatch, "can_run_triton", lambda call: (True, ""))
    if torch.version.cuda is None:
        assert dispatch.can_run_cuda(Call(model, x)) == (False, "the CUDA kernels are off: this torch has no CUDA")


@pytest.mark.parametrize("known", [False, True])
def test_matrix_tiles_are_compiled_where_the_compiler_knows_them(known, builder, tmp_path: Path, monkeypatch):
    compiler = tmp_path / "c++"
    refusing = 'case "$*" in *-mamx*) exit 1;; esac\n'
    compiler.write_text(f"#!/bin/sh\n{'' if known else refusing}exit 0\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(builder.platform, "machine", lambda: "x86_64")
    pieces, _ = builder.cpu_commands(tmp_path / "library.so", tmp_path)
    commands = {source.name: command for source, _, command in pieces}
    assert ("-mamx-bf16" in commands["avx512.cpp"]) == known
    assert "-mavx512f" in commands["avx512.cpp"] and "-mamx-bf16" not in commands["avx2.cpp"]
