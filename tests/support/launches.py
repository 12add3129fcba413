"""Counts what a pass by the Triton kernels asks of the host, on a CPU: the kernels are stubs that compute nothing."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Iterator

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from unetpp_fast.execution.fused import operators

MODULES = ("conv", "conv_wgrad", "head", "norm", "pool", "read", "weights")
BODIES = {"forward": operators.forward_op, "backward": operators.backward_op}


class Stub:
    """Stands for a kernel and counts its launches."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **kwargs) -> None:
        self.launches[self.name] += 1


@contextlib.contextmanager
def stubbed() -> Iterator[Counter[str]]:
    """Inside, no kernel runs, and tensors on the CPU take the way of those on a GPU; yields the launches by kernel."""
    launches: Counter[str] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in MODULES:
            module = importlib.import_module(f"unetpp_fast.kernels.{name}")
            for kernel in [kernel for kernel in vars(module) if kernel.endswith("_kernel")]:
                patch.setattr(module, kernel, Stub(kernel, launches))
        for name in ("conv", "conv_wgrad", "triton_ops"):
            patch.setattr(importlib.import_module(f"unetpp_fast.kernels.{name}"), "interpreted", lambda x: False)
        patch.setattr(importlib.import_module("unetpp_fast.kernels.conv_wgrad"), "multiprocessors", lambda device: 132)
        yield launches


class Operators(TorchDispatchMode):
    """Counts allocations and other operators, inside the fused ones too; views are neither, and composites are what they
    are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.others: Counter[str] = Counter()
        self.allocations: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        with self:
            if func.namespace == "unetpp_fast":
                return BODIES[name]._init_fn(*args, **kwargs)
            if not name.startswith(("empty", "new_empty")):
                result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
        if name.startswith(("empty", "new_empty")):
            self.allocations[name] += 1
        elif not _is_view(func):
            self.others[name] += 1
        return func(*args, **kwargs)


def _is_view(func) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)
