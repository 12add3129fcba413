"""Modules around a model: those that compute what it computes are taken off, the others are named."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel)


def unwrapped(module: Any) -> Any:
    """The model inside `nn.DataParallel`, `DistributedDataParallel`, `AveragedModel` and `torch.compile`; else the module.

    Raises:
        ValueError: a wrapper has hooks, which would be left out.
    """
    while isinstance(module, WRAPPERS) or hasattr(module, "_orig_mod"):
        if module._forward_hooks or module._forward_pre_hooks:
            raise ValueError(f"this {type(module).__name__} has hooks: put them on the model inside it")
        module = module._orig_mod if hasattr(module, "_orig_mod") else module.module
    return module


def network_of(module: Any, what: str) -> Any:
    """The model of this package that `module` is, or that a wrapper holds; `what`: the function that needs it.

    Raises:
        TypeError: it is another module; the message names a model inside it.
    """
    module = unwrapped(module) if isinstance(module, nn.Module) else module
    if hasattr(module, "engine_input"):
        return module
    raise TypeError(f"{what} takes a model of this package, not {type(module).__name__}{hint(module)}")


def hint(module: object) -> str:
    """Where a model of this package is inside another module, in words; "" if there is none, or more than one."""
    if not isinstance(module, nn.Module):
        return ""
    inner = [name for name, part in module.named_modules() if name and hasattr(part, "engine_input")]
    inner = [name for name in inner if not any(name.startswith(f"{other}.") for other in inner)]
    return f": give its .{inner[0]}, or make that what its own forward adds to it" if len(inner) == 1 else ""
