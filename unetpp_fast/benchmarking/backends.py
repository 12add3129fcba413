"""PyTorch and the backends of this package, as builders of `implementations.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..architecture.precision import autocast
from ..deployment.optimized import optimize
from ..execution import dispatch
from ..execution.call import Call
from ..models.network import Network
from .case import Case, Prepared, Unavailable, captured, prepare, with_backend


def eager(network: Network, x: Tensor, case: Case, channels_last: bool = False) -> Prepared:
    """Plain PyTorch."""
    return prepare(with_backend(network, "reference"), x, case, channels_last)


def compiled(network: Network, x: Tensor, case: Case, mode: str = "default") -> Prepared:
    """`torch.compile` of the channels-last network; for inference on a CPU with frozen weights, which is faster there."""
    options = dict(torch._inductor.list_mode_options(mode))
    if x.device.type == "cpu" and not case.training:
        options["freezing"] = True
    if captured(case, x.device):
        options["triton.cudagraphs"] = False  # the harness captures the whole run, as for the other implementations
    prepared = prepare(with_backend(network, "reference"), x, case, channels_last=True)
    prepared.forward = torch.compile(prepared.forward, options=options, dynamic=False)
    return prepared


def fused(network: Network, x: Tensor, case: Case, backend: str = "auto", recompute: bool = False) -> Prepared:
    """This package: for inference the module that `optimize` makes, if it runs on the chosen backend.

    recompute: training recomputes maps to save memory.

    Raises:
        Unavailable: the reference would run instead, the kernels would run in the interpreter, or nothing is recomputed.
    """
    if recompute and not case.training:
        raise Unavailable("only training recomputes maps")
    network = with_backend(network, backend).train(case.training)
    network.recompute = recompute
    with autocast(x.device, case.dtype), torch.set_grad_enabled(case.training):
        name, reason = dispatch.choose(Call(*network.engine_input(x)))
    if name == "triton" and x.device.type != "cuda":
        raise Unavailable("times in Triton's interpreter mean nothing")
    if not case.training and backend in ("auto", name):
        return Prepared(optimize(network, dtype=case.torch_dtype), x, capturable=False)
    if name == "reference":
        raise Unavailable(reason)
    return prepare(network, x, case)
