"""Packaging, and the CUDA kernels of csrc/ where they can be built; the package is complete without them.

UNETPP_FAST_BUILD: "cuda" builds the kernels or fails; "none" does not; "auto", the default, builds them where nvcc and a
torch with CUDA are, and otherwise says in one line why not. They are compiled against the torch that is installed, so
without build isolation: pip install --no-build-isolation .
"""

import importlib.util
import os
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
LIBRARY = "unetpp_fast.execution.fused.unetpp_fast_cuda"
MODE = os.environ.get("UNETPP_FAST_BUILD", "auto")
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "unetpp_fast/common/version.py").read_text()).group(1)

COMMANDS = ["pillow>=10", "tqdm>=4.60"]
DEMO = [*COMMANDS, "matplotlib>=3.7"]
TIFF = ["tifffile>=2022.8", "imagecodecs"]
NIFTI = ["nibabel>=5"]
DICOM = ["pydicom>=2.4"]
KERAS = ["h5py>=3.8"]
TENSORBOARD = ["tensorboard>=2.14"]
EXPORT = ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]
TEST = [*DEMO, *EXPORT, *KERAS, *TIFF, *NIFTI, *DICOM, *TENSORBOARD]
TEST += ["monai>=1.4", "pytorch-ignite>=0.5", "pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "ruff>=0.9"]
BENCH = [*DEMO, *EXPORT, "monai>=1.4", "openvino>=2024", "pytest>=8", "pytest-benchmark>=4"]


def builder():
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("unetpp_fast_build", HERE / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def obstacle() -> str:
    """Why "auto" does not build the kernels here; "" where it does."""
    if builder().find_nvcc() is None:
        return "there is no nvcc"
    if importlib.util.find_spec("torch") is None:
        return "there is no torch to compile against (pip install --no-build-isolation)"
    import torch

    return "" if torch.version.cuda else f"torch {torch.__version__} has no CUDA"


def skip(reason: str) -> None:
    print(f"unetpp_fast: the CUDA kernels are not built, {reason}; Triton's serve instead", file=sys.stderr)


def wanted() -> bool:
    if MODE not in ("auto", "cuda", "none"):
        raise SystemExit(f"UNETPP_FAST_BUILD is auto, cuda or none, not {MODE!r}")
    reason = obstacle() if MODE == "auto" else ""
    if reason:
        skip(reason)
    return MODE != "none" and not reason


class BuildLibrary(build_ext):
    """The kernels as one library that no Python is linked to."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + ".so"

    def build_extension(self, extension: Extension) -> None:
        try:
            builder().build(Path(self.get_ext_fullpath(extension.name)).resolve(), Path(self.build_temp).resolve() / "csrc")
        except RuntimeError as error:
            if MODE == "cuda":
                raise
            extension.optional = True
            skip(f"a compiler failed: {error}")


class Wheel(bdist_wheel):
    """With the library the wheel fits one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.ext_modules else tag


setup(
    name="unetpp_fast",
    version=VERSION,
    description="UNet++ for PyTorch: nested U-Nets with deep supervision, pruning, the paper's loss and recipe",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # kernels/ and examples/ stand beside the package and are installed inside it; discovery would take them, csrc/ and
    # tests/ for packages of their own.
    packages=[*find_packages(include=["unetpp_fast", "unetpp_fast.*"]), "unetpp_fast.kernels", "unetpp_fast.examples"],
    package_dir={
        "unetpp_fast": "unetpp_fast",
        "unetpp_fast.kernels": "kernels",
        "unetpp_fast.examples": "examples",
    },
    package_data={"unetpp_fast": ["py.typed"], "unetpp_fast.examples": ["nuclei/*"]},
    ext_modules=[Extension(LIBRARY, sources=[], optional=MODE == "auto")] if wanted() else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    install_requires=["torch>=2.10", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.24"],
    extras_require={
        "commands": COMMANDS,
        "demo": DEMO,
        "tiff": TIFF,
        "nifti": NIFTI,
        "dicom": DICOM,
        "keras": KERAS,
        "tensorboard": TENSORBOARD,
        "bench": BENCH,
        "onnx": EXPORT,
        "test": TEST,
    },
    entry_points={"console_scripts": ["unetpp-fast = unetpp_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
