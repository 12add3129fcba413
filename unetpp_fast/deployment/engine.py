"""What modules that `optimize` makes have in common: weights that are composed once, and a choice of backend per call."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.output_forms import Outputs
from ..architecture.precision import without_tf32
from ..converters.converter import AGREEMENT
from ..execution import dispatch
from ..execution.call import Call, Inputs
from ..execution.cpu import inference
from ..execution.fused.forward import Forward
from ..execution.fused.ops import load_ops
from ..execution.plan.operands import all_operands
from ..models.own_forward import own_forward
from ..models.prediction import evaluating
from .cuda_graphs import Graphs

Run = Callable[[Inputs, Sequence[int]], list[Tensor]]


class Engine(nn.Module):
    """A network in eval mode, without gradients. Its weights are composed at the first call with a precision and device, and
    again after `load_state_dict` and `to`. Several threads may call it at once.

    as_is: why the network is called as it is, with its hooks and its own `forward`; "" if its passes run here.
    """

    as_is = ""

    def __init__(self, network: Any, dtype: torch.dtype | None):
        super().__init__()
        self.network, self.dtype = network.requires_grad_(False).eval(), dtype
        self.as_is = own_forward(network)
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

    def _called(self, run: Callable[..., Any], x: Tensor, **options: Any) -> Any:
        """`run(x)`, the network itself or its `predict`, in this module's precision."""
        with self._precision(x), torch.no_grad():
            return run(x, **options)

    def _why_as_is(self) -> str:
        """A line for `explain`, printed too; "" if there is nothing to tell."""
        if not self.as_is:
            return ""
        print(line := f"the model is called as it is: {self.as_is}")
        return f"\n{line}"

    @torch.no_grad()
    def compare(self, original: Any, image: Tensor) -> None:
        """Runs beside the original in plain PyTorch, in eval mode, on a small image: where they differ, the network is
        called as it is.

        The kernels take part on a CPU; on a GPU they are compared when they are measured (`tuning`).
        """
        if image.device.type == "meta":
            return
        if next(original.parameters()).dtype.itemsize < 4:
            original = copy.deepcopy(original).float()
        backend, original.backend = original.backend, "reference"
        with evaluating(original), torch.autocast(image.device.type, enabled=False), without_tf32():
            try:
                expected = original(image.to(next(original.parameters())))
            except (RuntimeError, TypeError, ValueError):  # as it would on an image of the user's: nothing to compare
                return
            finally:
                original.backend = backend
            if not _are_close(expected, self._beside(image)):
                self.as_is = "what was fused gave another result than the original on a small image"
        self._forget()

    def _beside(self, image: Tensor) -> Outputs:
        """What this module returns for an image in the precision of its weights; nothing is measured or captured."""
        raise NotImplementedError

    def _name_beside(self, call: Call) -> str:
        asked = self.network.backend in ("auto", "cpu") and call.x.device.type == "cpu"
        return "cpu" if asked and dispatch.can_run_cpu(call)[0] else "reference"

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        with self._lock:
            if key not in self._composed:
                with torch.inference_mode(False), torch.no_grad(), _not_traced():
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


@contextmanager
def _not_traced() -> Iterator[None]:
    """Inside, `torch.jit.trace` records nothing: what is made once is a constant of the graph."""
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch._C._set_tracing_state(state)  # type: ignore[attr-defined]


def _are_close(some: Outputs, others: Outputs) -> bool:
    """Whether two results have the same form and nearly the same values."""
    if isinstance(some, Tensor) or isinstance(others, Tensor):
        if not (isinstance(some, Tensor) and isinstance(others, Tensor)) or some.shape != others.shape:
            return False
        return some.numel() == 0 or not bool((some - others).abs().max() > AGREEMENT * some.abs().max())
    return type(some) is type(others) and len(some) == len(others) and all(map(_are_close, some, others))


def _autocast(kind: str, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to `dtype` on a type of device; the caller's for None, disabled for float32 and float64."""
    if dtype is None:
        return torch.autocast(kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind))
    return torch.autocast(kind, dtype) if dtype.itemsize < 4 else torch.autocast(kind, enabled=False)
