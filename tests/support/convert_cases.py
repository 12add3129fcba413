"""Another implementation beside what `convert` makes of it: outputs, every gradient, statistics, and the way back."""

from __future__ import annotations

import copy

import torch
from support.helpers import FLOAT64, assert_close_relative, assert_gradients_close, gradients, weighted_sum
from torch import Tensor, nn

import unetpp_fast as uf
from unetpp_fast.converters.registry import PEERS


def assert_same_outputs(theirs: nn.Module, ours: nn.Module, x: Tensor, bound: float = FLOAT64) -> None:
    """Equal maps in the same container."""
    with torch.no_grad():
        expected, found = theirs(x), ours(x)
    assert type(found) is type(expected)
    assert_close_relative(found, expected, bound)


def assert_converts(theirs: nn.Module, peer: str, x: Tensor, bound: float = FLOAT64) -> nn.Module:
    """Converts a module and compares outputs, the gradients of the input and of every parameter, and the running statistics
    after the pass, in the mode of the module; then the way back. Returns the converted model."""
    theirs.zero_grad()
    ours = uf.convert(theirs)
    assert ours.training == theirs.training
    assert_round_trip(theirs, ours, peer)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)
    expected = theirs(other)
    torch.manual_seed(3)
    found = ours(mine)
    assert type(found) is type(expected)
    assert_close_relative(found, expected, bound)
    weighted_sum(expected).backward()
    weighted_sum(found).backward()
    assert_close_relative(mine.grad, other.grad, bound)
    pairs = list(PEERS[peer].pairs(ours))
    got = gradients(ours)
    assert not set(got) - {pair.ours for pair in pairs}
    renamed = {pair.theirs: pair.to_theirs(got[pair.ours]) for pair in pairs if pair.ours in got}
    assert_gradients_close(renamed, gradients(theirs), bound)
    buffers = dict(theirs.named_buffers())
    after = uf.to_state_dict(ours, peer)
    for name, buffer in buffers.items():
        assert_close_relative(after[name].double(), buffer.double(), bound)
    return ours


def assert_round_trip(theirs: nn.Module, ours: nn.Module, peer: str) -> None:
    """The peer's names and values come back exactly, and its own class takes them."""
    original = theirs.state_dict()
    assert_equal_state(uf.to_state_dict(ours, peer), original)
    copy.deepcopy(theirs).load_state_dict(uf.to_state_dict(ours, peer), strict=True)


def assert_equal_state(found: dict, expected: dict) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
