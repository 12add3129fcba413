"""The Makefile, `[tool.cibuildwheel]`, the workflow and csrc/build.py agree on what the wheels of a release are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support import csrc, library_needs

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML since 3.11")
FIRST_CUDA = {"10.0": (12, 8), "12.0": (12, 8)}  # whose nvcc knows a GPU; of older GPUs every one that torch still uses


@pytest.fixture(scope="module")
def settings() -> dict:
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]


@pytest.fixture(scope="module")
def with_cuda(settings) -> dict:
    """What is set for the wheel with the CUDA kernels alone."""
    (found,) = [part for part in settings["overrides"] if part["environment"]["UNETPP_FAST_BUILD"] == "cuda"]
    return found


def workflow() -> str:
    return (ROOT / ".github/workflows/wheels.yml").read_text()


def test_the_same_libraries_stay_outside_every_wheel(settings):
    """Those of torch, for which `make wheel` and a release tell auditwheel, and the tests `library_needs`."""
    made = re.search(r"^TORCH_LIBRARIES := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    released = re.findall(r"--exclude (\S+)", settings["linux"]["repair-wheel-command"])
    assert made == released == list(library_needs.TORCH)


def test_a_wheel_is_built_with_the_oldest_torch_and_tested_with_it(settings):
    oldest = re.search(r'"torch>=([\d.]+)"', (ROOT / "setup.py").read_text())[1]
    assert f" torch=={oldest}.0 " in settings["before-build"]
    major, minor = map(int, oldest.split("."))
    assert int(csrc.builder().TORCH_TARGET_VERSION, 16) == major << 56 | minor << 48
    assert f'torch: "{oldest}.0"' in workflow()


def test_one_cuda_is_installed_and_it_knows_every_gpu(with_cuda):
    packages = re.findall(r"cuda-([a-z-]+)-(\d+)-(\d+)", with_cuda["before-all"][-1])
    assert {name for name, *_ in packages} == {"nvcc", "cudart-devel"}
    ((major, minor),) = {tuple(map(int, version)) for _, *version in packages}
    assert with_cuda["environment"]["CUDA_HOME"] == f"/usr/local/cuda-{major}.{minor}"
    assert major == 12  # a runtime of 13 needs a newer driver than torches with CUDA 12 do
    gpus = [name.removesuffix("+PTX") for name in csrc.builder().ARCHITECTURES.split(";")]
    assert all(FIRST_CUDA.get(gpu, (0, 0)) <= (major, minor) for gpu in gpus)


def test_a_release_tests_both_libraries(settings, with_cuda):
    """In the environment of the build, which names what has to be there, and with other torches; and its machine code."""
    assert "{project}/tests/csrc/test_libraries.py" in settings["test-command"]
    assert with_cuda["test-command"] == f"{settings['test-command']} {{project}}/tests/csrc/test_sass.py"
    assert with_cuda["inherit"] == {"environment": "append"}
    assert re.search(r"pytest tests/csrc/test_libraries.py\n\s+env:\n\s+UNETPP_FAST_BUILD: cuda\b", workflow())
    assert {"cpu", "cu126", "cu128", "cu130"} == set(re.findall(r"build: (\w+),", workflow()))
