"""What modules that `optimize` makes have in common: weights that are composed once, and a choice of backend per call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..execution.call import Call, Inputs
from ..execution.cpu import inference
from ..execution.fused.forward import Forward
from ..execution.fused.ops import load_ops
from ..execution.plan.operands import all_operands
from .cuda_graphs import Graphs

Run = Callable[[Inputs, Sequence[int]], list[Tensor]]


class Engine(nn.Module):
    """A network in eval mode, without gradients. Its weights are composed at the first call with a precision and device, and
    again after `load_state_dict` and `to`. Several threads may call it at once."""

    def __init__(self, network: nn.Module, dtype: torch.dtype | None):
        super().__init__()
        self.network, self.dtype = network.requires_grad_(False).eval(), dtype
        if network.backend == "reference":
            network.backend = "auto"
        self._forget()

    def _forget(self) -> None:
        """Drops what was composed or captured: the weights have changed or moved."""
        self._composed: dict[tuple, Any] = {}
        self._graphs = Graphs()
        self._lock = threading.Lock()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self._forget()
        return self

    def _load_from_state_dict(self, *args) -> None:
        super()._load_from_state_dict(*args)
        self._forget()

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_composed", "_graphs", "_lock")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forget()

    def train(self, mode: bool = True) -> Engine:
        """Does nothing: this module is for inference only."""
        return self

    def _cast(self, x: Tensor) -> Tensor:
        """Images in the precision of the stored weights; autocast chooses that of the maps."""
        weight = next(self.network.parameters())
        return x.to(weight.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

    def _precision(self, x: Tensor) -> torch.autocast:
        """Autocast to this module's precision; the caller's if it has none."""
        return _autocast(x.device.type, self.dtype)

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._composed:
                with torch.inference_mode(False), torch.no_grad():
                    self._composed[key] = make()
            return self._composed[key]

    def _by_engine(self, name: str, call: Call) -> Run:
        """A fused pass with the ops `name` and operands composed once."""
        structure, dtype = call.structure, call.dtype
        modes = structure.modes("0" * len(structure.norms), keep=False)

        def make() -> tuple[dict[str, Tensor], dict]:
            with torch.autocast(call.x.device.type, enabled=False):
                tensors = call.tensors()
                return tensors, all_operands(structure.plan, tensors, modes, dtype)

        tensors, composed = self._once(("engine", structure.handle, dtype, call.x.device), make)

        def run(x: Inputs, columns: Sequence[int]) -> list[Tensor]:
            if name == "cpu":
                return inference.run(structure, composed, tensors, modes, x, dtype, columns)
            with torch.autocast(call.x.device.type, enabled=False):
                forward = Forward(structure.plan, load_ops(name), modes, tensors, dtype, operands=composed)
                return forward.run(x, keep=False, columns=columns)[0]

        return run


def _autocast(kind: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on a type of device; the caller's for None, disabled for float32 and float64."""
    if dtype is None:
        return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    return torch.autocast(kind, dtype) if dtype.itemsize < 4 else torch.autocast(kind, enabled=False)
