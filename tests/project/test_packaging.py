"""The built wheel in a separate environment, and the rules of the source tree."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = """
import pathlib, sys, torch
import unetpp_fast as uf, unetpp_fast.kernels
from unetpp_fast.experiments import demo
for module in (uf, uf.kernels):
    assert pathlib.Path(module.__file__).is_relative_to(sys.prefix), module.__file__
assert demo.example("nuclei/image.png").is_relative_to(sys.prefix)
assert uf.UNetPlusPlus(1, features=(4, 8)).predict(torch.rand(1, 1, 9, 13)).shape == (1, 1, 9, 13)
print("fine", uf.__version__)
"""


def run(*command: str | Path, **options) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from a copy of the tree without the files that git ignores."""
    source, out = tmp_path_factory.mktemp("wheel") / "source", tmp_path_factory.mktemp("out")
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", *ignored))
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", out, source)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"unetpp_fast"}
    for name in ("unetpp_fast/py.typed", "unetpp_fast/kernels/__init__.py", "unetpp_fast/examples/nuclei/image.png"):
        assert name in names
    assert "unetpp_fast/examples/nuclei/LICENSE.stardist.txt" in names
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_runs_in_a_fresh_environment(wheel, tmp_path):
    """Fresh except for torch, numpy and pip, which a path file lends: this does not test their download."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    assert run(python, "-c", CHECK, cwd=tmp_path).startswith("fine")
    assert "reference" in run(python, "-m", "unetpp_fast.info", cwd=tmp_path)
    assert "predict" in run(tmp_path / "env/bin/unetpp-fast", "--help", cwd=tmp_path)


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
