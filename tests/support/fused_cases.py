"""Runs a network by the engine and by the reference, and compares everything they return."""

from __future__ import annotations

import copy

import torch
from support.helpers import assert_close_relative, assert_gradients_close, gradients, weighted_sum
from torch import Tensor, nn

from unetpp_fast.execution import reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators
from unetpp_fast.models.network import Network


def assert_same_passes(
    network: Network, x: Tensor, ops: str = "naive", heads: slice = slice(None), bound: float = 1e-9
) -> None:
    """Compares outputs, gradients of input and parameters (absent ones too) and running statistics of the engine with the
    reference's, after a forward and a backward pass from some of the heads."""
    other = copy.deepcopy(network)
    results = []
    for model, run in ((network, reference.forward), (other, run_fused(ops))):
        model.zero_grad()
        mine = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
        outputs = run(model, mine)
        weighted_sum(outputs[heads]).backward()
        results.append((outputs, mine.grad, gradients(model), dict(model.named_buffers())))
    (expected, expected_gx, expected_gradients, expected_buffers), (outputs, gx, gradients_of, buffers) = results
    assert_close_relative(outputs, expected, bound)
    assert_close_relative(gx, expected_gx, bound)
    assert_gradients_close(gradients_of, expected_gradients, bound)
    for name, buffer in expected_buffers.items():
        assert_close_relative(buffers[name].double(), buffer.double(), bound)


def run_fused(ops: str):
    """`reference.forward` by the engine with these ops."""
    return lambda network, x: operators.forward(Call(network, x), ops)


def assert_same_inference(network: Network, x: Tensor, ops: str = "naive", bound: float = 1e-9) -> None:
    """As `assert_same_passes`, without gradients."""
    with torch.no_grad():
        expected = reference.forward(network, x)
        assert_close_relative(run_fused(ops)(network, x), expected, bound)


def replica(model: nn.Module) -> nn.Module:
    """As `nn.DataParallel` makes it for another device: the parameters are plain attributes, no parameters."""
    copies = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, other in copies.items():
        other._modules = {name: copies[child] for name, child in module._modules.items()}
        for name, value in module._parameters.items():
            setattr(other, name, None if value is None else value.clone())
    return copies[model]
