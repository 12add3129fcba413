"""`python -m unetpp_fast.info`: what is installed here and what can run."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from . import __version__, backends


def lines() -> list[str]:
    """One line a fact."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "not installed"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else "not available"
    facts = {
        "unetpp_fast": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": triton,
        "CUDA": torch.version.cuda or "not in this torch",
        "cuDNN": cudnn,
        "threads": torch.get_num_threads(),
        "GPUs": ", ".join(_gpus()) or "none that torch can use",
        "backends": ", ".join(backends.BACKENDS),
        "extension": "none in this version",
        "kernels proven on a GPU": "no run on a GPU is recorded: backend='auto' is the plain-PyTorch reference",
    }
    return [f"{name:<24} {value}" for name, value in facts.items()]


def _gpus() -> list[str]:
    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB)"
        )
    return names


if __name__ == "__main__":
    print("\n".join(lines()))
