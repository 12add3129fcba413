"""The source distribution, the wheel built from it in an environment without a compiler, and the rules of the tree."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
CHECK = """
import pathlib, shutil, sys, torch
import unetpp_fast as uf, unetpp_fast.kernels
from unetpp_fast.experiments import demo
for module in (uf, uf.kernels):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__
assert demo.example("nuclei/image.png").is_relative_to(sys.prefix)
assert not any(map(shutil.which, ("cc", "c++", "gcc", "g++", "clang", "clang++", "nvcc")))
torch.manual_seed(0)
model = uf.UNetPlusPlus(1, features=(8, 16), backend=sys.argv[1])
x = torch.rand(1, 1, 16, 16)
loss = uf.BCEDiceLoss()(model(x), (x > 0.5).float())
loss.backward()
print("fine", uf.__version__, loss.item(), sum(p.grad.double().square().sum() for p in model.parameters()).item())
"""
SOURCES = (
    "LICENSE", "README.md", "setup.py", "pyproject.toml", "CITATION.cff", "csrc/build.py", "csrc/kernels.cu",
    "csrc/cpu/conv.h", "csrc/emulation/server.cpp", "kernels/naive.py", "unetpp_fast/py.typed", "examples/serve.py",
    "examples/nuclei/image.png", "examples/nuclei/LICENSE.stardist.txt",
)  # fmt: skip
COMPILER = shutil.which("g++") or shutil.which("clang++")
BOTH = COMPILER is not None and sys.platform == "linux"  # libraries are in the wheel
# Stands in for nvcc: kernels without content, so that a wheel with both libraries is built in seconds and where there is no
# nvcc. `test_sass.py` builds the real ones.
NVCC = """#!/bin/sh
for last; do :; done
case "$*" in
  --list-gpu-code) echo sm_80 sm_90 sm_100 sm_120 ;;
  *" -c "*) echo | {compiler} -x c++ -fPIC -c - -o "$last" ;;
  *) exec {compiler} $(echo "$*" | sed "s/-Xlinker=/-Wl,/") ;;
esac
"""


def run(*command: str | Path, **options) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "UNETPP_FAST_BUILD")}
    environment |= options.pop("environment", {})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """What the source distribution unpacks to, made from a copy of the tree without the files that git ignores."""
    tree, out = tmp_path_factory.mktemp("tree") / "tree", tmp_path_factory.mktemp("sdist")
    ignored = (ROOT / ".gitignore").read_text().split()
    anywhere = [pattern.rstrip("/") for pattern in ignored if not pattern.startswith("/")]
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", *anywhere))
    build = f"from setuptools.build_meta import build_sdist; build_sdist({str(out)!r})"
    run(sys.executable, "-c", build, cwd=tree, environment={"UNETPP_FAST_BUILD": "none"})
    (packed,) = out.glob("*.tar.gz")
    with tarfile.open(packed) as archive:
        archive.extractall(out, filter="data")
    return out / packed.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory) -> Path:
    """A wheel built from the source distribution: on Linux, if there is a compiler, with both libraries. The real CUDA
    kernels take many minutes where there are nvcc and a torch with CUDA."""
    out, home = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("cuda")
    (home / "bin").mkdir()
    (home / "bin" / "nvcc").write_text(NVCC.format(compiler=COMPILER))
    (home / "bin" / "nvcc").chmod(0o755)
    kinds = "cuda" if BOTH else "cpu" if COMPILER else "none"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out]
    run(*command, source, environment={"CUDA_HOME": str(home), "UNETPP_FAST_BUILD": kinds})
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """Of an environment with the wheel. Fresh except for torch, numpy and pip, which a path file lends: this does not test
    their download."""
    folder = tmp_path_factory.mktemp("fresh") / "env"
    venv.create(folder)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    return python


def test_the_source_distribution_is_complete(source):
    assert not [name for name in SOURCES if not (source / name).is_file()]
    for folder in ("csrc", "kernels", "examples", "unetpp_fast"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file() and path.suffix not in (".pyc", ".so")]
        assert not sorted(path for path in files if not (source / path.relative_to(ROOT)).is_file())


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"unetpp_fast"}
    for name in ("unetpp_fast/py.typed", "unetpp_fast/kernels/__init__.py", "unetpp_fast/examples/nuclei/image.png"):
        assert name in names
    assert "unetpp_fast/examples/nuclei/LICENSE.stardist.txt" in names
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.skipif(not BOTH, reason="the kernels need a compiler, auditwheel Linux")
def test_the_wheel_becomes_one_for_every_linux(wheel, tmp_path):
    """By the command of `make wheel-cuda`. The libraries need torch's, which are not packed in, and no Python."""
    pytest.importorskip("auditwheel")
    torch_libraries = re.search(r"^TORCH_LIBRARIES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    excluded = [part for name in torch_libraries for part in ("--exclude", name)]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    run(sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", tmp_path, *excluded, wheel, environment={"PATH": path})
    (repaired,) = tmp_path.glob("*.whl")
    assert "-py3-none-manylinux_" in repaired.name
    libraries = sorted(name for name in zipfile.ZipFile(repaired).namelist() if ".so" in name)
    assert libraries == [f"unetpp_fast/execution/fused/unetpp_fast_{kind}.so" for kind in ("cpu", "cuda")]


def test_the_wheel_runs_without_a_compiler(python, tmp_path):
    """Its CPU kernels too, which compute what the reference does; PATH leads to this environment alone. Of the CUDA kernels
    it says why they are off: this torch has no CUDA, or, if it has, the ones of this wheel lack their content."""
    alone = {"PATH": str(python.parent)}
    loss, gradients = {}, {}
    for backend in ("reference", "cpu") if COMPILER else ("reference",):
        said = run(python, "-c", CHECK, backend, cwd=tmp_path, environment=alone).split()
        assert said[0] == "fine"
        loss[backend], gradients[backend] = map(float, said[2:])
    assert list(loss.values()) == pytest.approx([loss["reference"]] * len(loss), rel=1e-5)
    assert list(gradients.values()) == pytest.approx([gradients["reference"]] * len(loss), rel=1e-3)
    said = run(python, "-m", "unetpp_fast.info", cwd=tmp_path, environment=alone)
    facts = {line[:24].strip(): line[25:] for line in said.splitlines()}
    assert "reference" in facts["backends"]
    if BOTH:
        assert facts["CPU kernels"].startswith("loaded")
        why = "this torch has no CUDA" if torch.version.cuda is None else "it does not load: "
        assert facts["CUDA kernels"].startswith(f"off: {why}")
    assert "predict" in run(python.parent / "unetpp-fast", "--help", cwd=tmp_path, environment=alone)


def test_a_bare_import_of_kernels_is_refused():
    done = subprocess.run([sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0 and "unetpp_fast.kernels" in done.stderr


def test_the_package_needs_only_torch_and_numpy():
    """Everything else is an extra, imported through `common.extras.need` where it is used."""
    allowed = {"torch", "numpy", "triton", "unetpp_fast"} | sys.stdlib_module_names
    for path in sorted((ROOT / "unetpp_fast").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            assert not {name.split(".")[0] for name in names} - allowed, f"{path}: {names}"


def test_files_and_functions_are_short():
    for folder in ("unetpp_fast", "kernels", "tests", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            assert text.count("\n") <= 400, f"{path} has more than 400 lines"
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    assert node.end_lineno - node.lineno < 80, f"{path}: {node.name} has more than 80 lines"


def test_every_public_name_is_documented():
    import unetpp_fast

    for name in unetpp_fast.__all__:
        assert name == "__version__" or len(getattr(unetpp_fast, name).__doc__ or "") > 30, name
