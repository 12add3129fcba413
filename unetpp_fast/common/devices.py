"""Devices by name, and waiting for them."""

from __future__ import annotations

import torch

from .errors import InputError


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
