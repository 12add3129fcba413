"""`unetpp-fast info` and `python -m unetpp_fast.info`: what is installed and what can run on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from ..benchmarking import records
from ..common.errors import InputError
from ..common.version import __version__
from ..execution import dispatch
from ..execution.fused import libraries
from ..execution.source_hash import source_hash
from .arguments import Commands, add_command


def add_parser(commands: Commands) -> None:
    """Adds `info` to the commands."""
    add_command(
        commands, "info", run, "Print versions, devices, backends, and whether a GPU has run these kernels.", config=False
    )


def run(options: argparse.Namespace) -> None:
    """Prints `lines`."""
    print("\n".join(lines()))


def lines() -> list[str]:
    """One line per fact."""
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
        "backends": ", ".join(dispatch.BACKENDS),
        "CPU kernels": libraries.state("cpu"),
        "CUDA kernels": libraries.state("cuda"),
        "kernels proven on a GPU": _proven(),
        "AMD GPUs": "the Triton kernels compile for gfx942; they have not run there",
        "sources": source_hash(),
        "records": _recorded(),
    }
    return [f"{name:<24} {value}" for name, value in facts.items()]


def _proven() -> str:
    """The GPUs on which the present kernels gave right results, according to the records in this tree."""
    rows = [row for machine in _records().values() for row in machine if row["cuda"] and records.is_current(row)]
    if not rows:
        return "no run of these sources on a GPU is recorded"
    return "; ".join(sorted({f"{row['device']}, commit {row['commit']}, {row['date'][:10]}" for row in rows}))


def _recorded() -> str:
    try:
        return records.summary()
    except InputError as error:
        return str(error)


def _records() -> dict[str, list[dict]]:
    try:
        return records.read_all()
    except InputError:  # `_recorded` reports it
        return {}


def _gpus() -> list[str]:
    names = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        names.append(
            f"{properties.name} (sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB)"
        )
    return names
