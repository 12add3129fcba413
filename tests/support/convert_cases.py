"""Comparison of another implementation with its conversion: outputs, gradients, statistics, and the round trip."""

from __future__ import annotations

import copy

import torch
from support.helpers import FLOAT64, assert_close_relative, assert_gradients_close, gradients, weighted_sum
from torch import Tensor, nn

import unetpp_fast as uf
from unetpp_fast.converters.registry import PEERS


def assert_same_outputs(theirs: nn.Module, ours: nn.Module, x: Tensor, bound: float = FLOAT64) -> None:
    """The outputs are equal and in the same container."""
    with torch.no_grad():
        expected, actual = theirs(x), ours(x)
    assert type(actual) is type(expected)
    assert_close_relative(actual, expected, bound)


def assert_converts(theirs: nn.Module, peer: str, x: Tensor, bound: float = FLOAT64) -> nn.Module:
    """Converts a module and compares, in the module's mode, the outputs, the gradients of the input and of every parameter,
    the running statistics after the pass, and the round trip. Returns the converted model."""
    theirs.zero_grad()
    ours = uf.convert(theirs)
    assert ours.training == theirs.training
    assert_round_trip(theirs, ours, peer)
    mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.manual_seed(3)
    expected = theirs(other)
    torch.manual_seed(3)
    actual = ours(mine)
    assert type(actual) is type(expected)
    assert_close_relative(actual, expected, bound)
    weighted_sum(expected).backward()
    weighted_sum(actual).backward()
    assert_close_relative(mine.grad, other.grad, bound)
    pairs = list(PEERS[peer].pairs(ours))
    own = gradients(ours)
    assert not set(own) - {pair.ours for pair in pairs}
    renamed = {pair.theirs: pair.to_theirs(own[pair.ours]) for pair in pairs if pair.ours in own}
    assert_gradients_close(renamed, gradients(theirs), bound)
    buffers = dict(theirs.named_buffers())
    after = uf.to_state_dict(ours, peer)
    for name, buffer in buffers.items():
        assert_close_relative(after[name].double(), buffer.double(), bound)
    return ours


def assert_round_trip(theirs: nn.Module, ours: nn.Module, peer: str) -> None:
    """The inverse conversion gives the peer's exact names and values, and its class loads them."""
    original = theirs.state_dict()
    assert_equal_state(uf.to_state_dict(ours, peer), original)
    copy.deepcopy(theirs).load_state_dict(uf.to_state_dict(ours, peer), strict=True)


def assert_equal_state(actual: dict, expected: dict) -> None:
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype and torch.equal(actual[name], value), name
