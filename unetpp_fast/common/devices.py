"""Devices by name, and waiting for them."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch

from .errors import InputError

CPUINFO = Path("/proc/cpuinfo")


def wait(device: torch.device) -> None:
    """Returns when a CUDA device has finished all work that was queued; at once for other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU that works, else the CPU.

    Raises:
        InputError: this machine does not have it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0].split(". ")[0]
        raise InputError(f"device {name!r} cannot be used: {first}; --device cpu always works") from error
    return device


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} thread{'s' if threads > 1 else ''}"


def processor() -> str:
    """Its name, with family and model where it has no number, as on many rented machines, and its widest vectors."""
    try:
        text = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    model = re.search(r"^model name\s*:\s*(.+?)\s*$", text, re.MULTILINE)
    widest = next((label for flag, label in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if flag in text), "")
    name = model[1] if model else platform.machine()
    numbers = re.findall(r"^(?:cpu family|model)\s*:\s*(\d+)\s*$", text, re.MULTILINE)[:2]  # of the first core
    if model and not re.search(r"\d", name) and len(numbers) == 2:
        name += f" family {numbers[0]} model {numbers[1]}"
    return f"{name} {widest}".strip()
