"""A whole network, forward and backward: convolutions by the emulated CUDA kernels, the rest in plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from support.emulation import COMPILER, emulated
from support.helpers import build, make_input, weighted_sum

import unetpp_fast as uf
from unetpp_fast.execution import reference
from unetpp_fast.execution.acceptance import as_vector, disagreement
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators
from unetpp_fast.kernels import cuda_ops, naive

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation needs g++")
CASES = [
    {"norm": "batch", "upsample": "deconv"},
    {"norm": "instance", "upsample": "nearest", "act": ("leaky_relu", {"negative_slope": 0.1})},
    {"norm": None, "upsample": "linear"},
    {"norm": "batch", "upsample": "deconv", "spatial_dims": 3},
]


@pytest.fixture(scope="module")
def emulation():
    with emulated() as emulation:
        yield emulation


def passes(model: uf.Network, x: torch.Tensor, run) -> list[torch.Tensor]:
    """Outputs, gradient of the input and gradients of the parameters, each as one vector."""
    x = x.clone().requires_grad_()
    outputs = run(model, x)
    of_input, *gradients = torch.autograd.grad(
        weighted_sum([output.double() for output in outputs]), [x, *model.parameters()]
    )
    return [as_vector(group) for group in (outputs, [of_input], gradients)]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_emulation_of_a_network(emulation, monkeypatch: pytest.MonkeyPatch, options: dict):
    """In bfloat16: at most twice the error of the same engine in plain PyTorch, plus one rounding."""
    counted, axes = [], options.get("spatial_dims", 2)
    for name in ("conv", "conv_wgrad"):
        inner = getattr(cuda_ops, name)
        monkeypatch.setattr(
            cuda_ops, name, lambda *args, inner=inner, **kwargs: counted.append(inner) or inner(*args, **kwargs)
        )
    for name in set(cuda_ops.__all__) - {"conv", "conv_wgrad", "can_run_conv", "can_run_conv_wgrad"}:
        monkeypatch.setattr(cuda_ops, name, getattr(naive, name))
    monkeypatch.setattr(cuda_ops, "triton_ops", None)  # every convolution is done by the CUDA kernels
    features = (8, 12, 40) if axes == 2 else (8, 12)
    model = build(uf.UNetPlusPlus, 3, 2, features=features, deep_supervision=True, backend="reference", **options)
    x = make_input(2, 3, *((12, 20) if axes == 2 else (2, 4, 6)))
    exact = passes(copy.deepcopy(model).double(), x.double(), reference.forward)
    plain, emulated_passes = (
        passes(copy.deepcopy(model), x, lambda network, x, ops=ops: operators.forward(Call(network, x, torch.bfloat16), ops))
        for ops in ("naive", "cuda")
    )
    assert len(counted) > 12
    assert not disagreement(exact, plain, emulated_passes, torch.bfloat16)
