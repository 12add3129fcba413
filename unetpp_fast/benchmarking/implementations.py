"""The implementations that benchmarks compare, in one table.

To add one, write its builder and add one entry: records accept its rows, `benchmarks/` measures it, tables and pictures
show it. Tables list implementations in this order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..models.network import Network
from . import backends, mobile_runtimes, peers, runtimes
from .case import Builder, Case, Prepared, Unavailable, load


@dataclass(frozen=True)
class Implementation:
    """One way to run a network. A call checks what it needs, then builds it.

    build: from a network, an input `[N, C, *S]` and a case to something ready to run, or `Unavailable` with the reason.
    colour: in pictures.
    needs: the modules it imports; extra: the extra of this package that installs them, if there is one.
    devices: the types of devices it runs on; empty for any.
    trains: whether it has a backward pass.
    model: the only network of `benchmarks/cases.py` that it is measured on; None for all.
    tolerance: the relative error of its outputs up to which it is measured, though it is less exact than `acceptance`
        allows: its rows state the error. None for what must be exact.
    ops: the ops that it runs (`execution.fused.ops.load_ops`), if `benchmarks/op_cases.py` measures them one by one.
    """

    build: Builder
    colour: str
    needs: tuple[str, ...] = ()
    extra: str | None = None
    devices: tuple[str, ...] = ()
    trains: bool = True
    model: str | None = None
    ops: str | None = None
    tolerance: float | None = None

    def __call__(self, network: Network, x: Tensor, case: Case) -> Prepared:
        if self.devices and x.device.type not in self.devices:
            raise Unavailable(f"it runs on {' and '.join(self.devices)} only")
        if case.training and not self.trains:
            raise Unavailable("it does not train")
        for module in self.needs:
            load(module, self.extra)
        return self.build(network, x, case)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "eager": Implementation(backends.eager, "#9aa5b1"),
    "eager-channels-last": Implementation(partial(backends.eager, channels_last=True), "#6b7a8c"),
    "compile": Implementation(backends.compiled, "#3b6fd9"),
    "compile-max-autotune": Implementation(partial(backends.compiled, mode="max-autotune"), "#1d4ba8"),
    "fused": Implementation(backends.fused, "#d9483b"),
    "fused-triton": Implementation(partial(backends.fused, backend="triton"), "#e8795c", devices=("cuda",), ops="triton"),
    "fused-cuda": Implementation(partial(backends.fused, backend="cuda"), "#a82a1f", devices=("cuda",), ops="cuda"),
    "fused-cpu": Implementation(partial(backends.fused, backend="cpu"), "#f0a35e", devices=("cpu",)),
    "fused-cpu-recompute": Implementation(
        partial(backends.fused, backend="cpu", recompute=True), "#f7cfa4", devices=("cpu",)
    ),
    "monai": Implementation(peers.monai, "#4aa564", ("monai",), "bench", model="monai-unet++"),
    "smp": Implementation(peers.smp, "#2f7d46", ("segmentation_models_pytorch",), model="smp-unet++"),
    "onnxruntime": Implementation(
        runtimes.onnxruntime, "#8a5cc2", ("onnxruntime", "onnxscript"), "bench", ("cpu", "cuda"), trains=False
    ),
    "openvino": Implementation(runtimes.openvino, "#5f3a94", ("openvino", "onnxscript"), "bench", ("cpu",), trains=False),
    "ncnn": Implementation(
        mobile_runtimes.ncnn, "#c9a227", ("ncnn", "pnnx", "onnxscript"), "bench", ("cpu",), trains=False, tolerance=1e-2
    ),
    "mnn": Implementation(
        mobile_runtimes.mnn, "#9c7a14", ("MNN", "onnxscript"), "bench", ("cpu",), trains=False, tolerance=1e-2
    ),
    "tensorrt": Implementation(runtimes.tensorrt, "#76b900", ("torch_tensorrt",), devices=("cuda",), trains=False),
}


def measured_on(model: str) -> list[str]:
    """The names of the implementations that are measured on a network of `benchmarks/cases.py`."""
    return [name for name, entry in IMPLEMENTATIONS.items() if entry.model in (None, model)]
