"""Which variants of the Triton kernels a pass compiles, found on a machine without a GPU.

A pass over meta tensors launches its kernels with the same arguments as on a GPU: sizes, strides, precisions and, since
memory is allocated at multiples of 16 bytes, the alignment of addresses. Triton asks a stand-in for the driver for its
target and tells a hook what it would compile; nothing is compiled or computed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unetpp_fast.execution.fused import operators
from unetpp_fast.kernels import conv, conv_wgrad, triton_ops
from unetpp_fast.models.network import Network

TARGET = GPUTarget("cuda", 90, 32)
SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory that a program may take there
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Variant:
    """A kernel as Triton compiles it, in values that JSON can hold. constants, attributes: by argument's place."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, int | float | bool | str | None], ...]
    attributes: tuple[tuple[int, str], ...]
    options: tuple[tuple[str, int | bool], ...]

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Variant:
        """The inverse of `text`."""
        fields = json.loads(text)
        return cls(*(fields[name] if name in ("module", "name") else _tuples(fields[name]) for name in cls.__annotations__))

    def source(self) -> ASTSource:
        """As Triton's compiler takes it, of the kernel in the tree."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        constants = {(place,): value for place, value in self.constants}
        attributes = {(place,): json.loads(value) for place, value in self.attributes}
        return ASTSource(kernel, dict(self.signature), constants, attributes)


def _tuples(value: list) -> tuple:
    return tuple(tuple(pair) for pair in value)


class StandIn:
    """Takes the place of Triton's driver: a GPU of a target that has no streams and runs nothing."""

    def __init__(self, target: GPUTarget = TARGET) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: ASTSource, metadata: object) -> object:
        """What launches a kernel: nothing here."""


@contextmanager
def recorded(target: GPUTarget = TARGET) -> Iterator[dict[Variant, None]]:
    """Inside, launches on meta tensors are recorded, each variant once, in order, as on a GPU of that target."""
    found: dict[Variant, None] = {}

    def hook(*, fn, compile, **_) -> bool:
        constants = tuple((place, value) for (place,), value in compile["constants"].items())
        attributes = tuple((place, json.dumps(value)) for (place,), value in compile["configs"][0].items())
        options = tuple((name, compile[name]) for name in OPTIONS)
        found[Variant(fn.module, fn.name, tuple(compile["signature"].items()), constants, attributes, options)] = None
        return True  # it need not be compiled

    before = triton.runtime.driver._active, triton.knobs.runtime.jit_cache_hook
    library = SimpleNamespace(conv=lambda *args: None, conv_wgrad=lambda *args: None)
    with ExitStack() as stack:
        for module in (conv, conv_wgrad, triton_ops):
            stack.enter_context(mock.patch.object(module, "interpreted", lambda x: False))
        shared = SHARED.get(target.arch, triton_ops.LEAST_SHARED)
        stack.enter_context(mock.patch.object(triton_ops, "shared_memory", lambda device: shared))
        stack.enter_context(mock.patch.object(conv_wgrad, "multiprocessors", lambda device: 132))
        stack.enter_context(mock.patch.dict(torch.ops.__dict__, unetpp_fast_cuda=library))
        stack.enter_context(mock.patch.object(torch, "autocast", lambda *args, **options: nullcontext()))  # unknown to meta
        triton.runtime.driver.set_active(StandIn(target))
        triton.knobs.runtime.jit_cache_hook = hook
        try:
            yield found
        finally:
            triton.runtime.driver._active, triton.knobs.runtime.jit_cache_hook = before


def run_pass(network: Network, x: Tensor, dtype: torch.dtype, ops: str, training: bool) -> None:
    """A fused pass on meta tensors in a precision: with `training`, forwards and backwards, from all heads."""
    network = network.to("meta").train(training)
    structure = network.structure
    norms = ("1" if training else "0") * len(structure.norms)
    settings = (structure.handle, norms, dtype, ops, "", False)
    tensors = [*(parameter.detach() for parameter in network.parameters()), *network.buffers()]
    results = operators.forward_op._init_fn([x], tensors, training, *settings)
    if not training:
        return
    parts = operators.Results.of(results, structure, structure.modes(norms, True))
    gradients = [torch.empty_like(logits) for logits in parts.logits]
    present = [True] * len(gradients)
    parameters = tensors[: len(structure.parameters)]
    operators.backward_op._init_fn([x], parameters, parts.kept, gradients, present, x.requires_grad, *settings)
