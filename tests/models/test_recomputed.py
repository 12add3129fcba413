"""Activations of an encoder that are computed again: the gradients and statistics of the plain modules to the last bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support import cpu_kernels
from support.encoders import encoded
from support.helpers import gradients, make_input, weighted_sum
from support.memory import Peak
from support.peer_libraries import library
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import unetpp_fast as uf
from unetpp_fast.models.recomputed import recomputing

MEMORY = 0.45  # of smp's activations, at most; the must is 0.6


class Block(nn.Module):
    """A convolution and a norm, then whatever is given; a gate and a padded convolution."""

    def __init__(self, act: Callable[[Tensor], Tensor]):
        super().__init__()
        self.first, self.norm, self.act = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), act
        self.gate, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        return self.second(F.pad(torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1))) * x, [0, 1, 0, 1]))


ACTS = {
    "relu": nn.ReLU(), "relu in place": nn.ReLU(inplace=True), "relu6": nn.ReLU6(), "relu6 in place": nn.ReLU6(inplace=True),
    "leaky in place": nn.LeakyReLU(0.1, inplace=True), "silu": nn.SiLU(), "silu in place": nn.SiLU(inplace=True),
    "hardswish in place": nn.Hardswish(inplace=True), "elu in place": nn.ELU(inplace=True), "gelu": nn.GELU("tanh"),
    "method": Tensor.relu, "in place by a method": Tensor.relu_, "tanh": torch.tanh, "none": lambda x: x,
    "changed in place afterwards": lambda x: F.silu(x).mul_(2), "clipped": lambda x: F.hardtanh(x, -0.2, 0.7),
}  # fmt: skip


def results(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor, passes: int = 1) -> list[Tensor]:
    """Output, gradients and buffers."""
    output = run(x)
    for _ in range(passes):
        weighted_sum([output]).backward(retain_graph=True)
    return [output, x.grad, *gradients(model).values(), *model.buffers()]


def recomputed(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with recomputing(x):
            return model(x)

    return run


def assert_same_bits(model: nn.Module, x: Tensor, **options) -> None:
    twin, mine = copy.deepcopy(model), x.clone().requires_grad_()
    expected = results(twin, twin, x.clone().requires_grad_(), **options)
    actual = results(model, recomputed(model), mine, **options)
    assert all(map(torch.equal, actual, expected)) and len(actual) == len(expected)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_are_those_of_the_plain_modules(act: str, layout: str) -> None:
    assert_same_bits(Block(ACTS[act]), make_input(2, 3, 9, 8, layout=layout), passes=2)


def kept_bytes(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with Peak() as peak:
        output = run(x)
    assert output is not None
    return sum(size for storage, size in peak.live.values() if not storage.expired())


def test_what_is_kept_is_what_the_norm_reads() -> None:
    """But a frozen norm's activations, and everything where others have hooks on what is saved, are kept."""
    x = make_input(2, 3, 64, 64)
    map_bytes = 2 * 8 * 62 * 62 * 4
    model = Block(nn.SiLU())
    small = kept_bytes(recomputed(model), x)
    assert small < 1.5 * map_bytes and kept_bytes(model, x) > 4 * map_bytes
    frozen = Block(nn.SiLU()).eval()
    assert kept_bytes(recomputed(frozen), x) >= kept_bytes(frozen, x)
    with torch.autograd.graph.save_on_cpu():
        assert kept_bytes(recomputed(model), x) == kept_bytes(model, x)


def test_a_tensor_that_was_changed_is_an_error() -> None:
    model, x = Block(nn.SiLU()), make_input(1, 3, 9, 8)
    output = recomputed(model)(x)
    with torch.no_grad():
        model.second.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_of_gradients_checkpoints_and_autocast() -> None:
    model, x = Block(nn.SiLU()).double(), make_input(2, 3, 7, 7, dtype=torch.float64).requires_grad_()
    twin = copy.deepcopy(model)
    seconds = []
    for run, net in ((model, model), (recomputed(twin), twin)):
        (gradient,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        seconds.append(torch.autograd.grad(gradient.square().sum(), list(net.parameters()), allow_unused=True))
    for one, other in zip(*seconds, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(checkpoint(recomputed(model), x, use_reentrant=False), model(x))
    usual, laid_out = model.float(), copy.deepcopy(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = (results(net, run, make_input(2, 3, 7, 7).requires_grad_()) for net, run in (
            (usual, usual), (laid_out, recomputed(laid_out)),
        ))  # fmt: skip
    assert all(map(torch.equal, actual, expected))


@cpu_kernels.needs_library()
@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet-b0", "resnet18"])
def test_a_network_keeps_less_than_half_of_what_smp_keeps(name: str) -> None:
    theirs = library("segmentation_models_pytorch").UnetPlusPlus(name, encoder_weights=None).train()
    ours, x = uf.convert(theirs), make_input(1, 3, 64, 64)
    ours.backend = "cpu"
    assert kept_bytes(ours, x) < MEMORY * kept_bytes(theirs, x)


def test_an_encoder_trains_as_without() -> None:
    model, x = encoded(), make_input(2, 3, 16, 16)
    model.backend = "reference"
    twin = copy.deepcopy(model)
    plain = results(twin, lambda x: sum(one.mean() for one in twin.encoder(x)[1:]), x.clone().requires_grad_())
    mine = results(model, lambda x: sum(one.mean() for one in model.maps(x)), x.clone().requires_grad_())
    assert all(map(torch.equal, mine, plain))
