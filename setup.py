"""Packaging. Pure Python in this version; no compiler, GPU or network access is needed to build."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "unetpp_fast/__init__.py").read_text()).group(1)

COMMANDS = ["pillow>=10", "tqdm>=4.60"]
DEMO = [*COMMANDS, "matplotlib>=3.7"]
EXPORT = ["onnx>=1.16", "onnxscript>=0.3", "onnxruntime>=1.18"]

setup(
    name="unetpp_fast",
    version=VERSION,
    description="UNet++ for PyTorch: nested U-Nets with deep supervision, pruning, the paper's loss and recipe",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    # Listed by hand: discovery would take other top-level folders for packages.
    packages=["unetpp_fast", "unetpp_fast.kernels", "unetpp_fast.examples"],
    package_dir={
        "unetpp_fast": "unetpp_fast",
        "unetpp_fast.kernels": "kernels",
        "unetpp_fast.examples": "examples",
    },
    package_data={"unetpp_fast": ["py.typed"], "unetpp_fast.examples": ["nuclei/*"]},
    install_requires=["torch>=2.10", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.24"],
    extras_require={
        "commands": COMMANDS,
        "demo": DEMO,
        "onnx": EXPORT,
        "test": [*DEMO, *EXPORT, "monai>=1.4", "pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.5", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["unetpp-fast = unetpp_fast.cli:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
