"""The emulation notices mistakes: each fault seeded into the kernels or the hardware makes the check of a call fail.

A missing barrier shows only if threads run in an order that needs it, so every order is tried, as in the tests of the
kernels.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.emulation import COMPILER, FAULTS, Emulation, emulated
from support.emulation_cases import check_conv, check_wgrad

from unetpp_fast.kernels import cuda_ops

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the emulation needs g++")
ORDERS = (0, 1, 2)
NODE = partial(
    check_conv, cuda_ops.conv, cuda_ops.CONFIGS[0], torch.float16, (18, 34), n=1, ka=40, phased=True, kb=24, affine="1 1"
)
TWO_STAGES = partial(check_conv, cuda_ops.conv, cuda_ops.CONFIGS[1], torch.float16, (9, 33), n=1, ka=72)
WGRAD = partial(check_wgrad, cuda_ops.conv_wgrad, cuda_ops.WgradConfig(1), torch.float16, (18, 34), n=1, rows=1)
DEEP = partial(
    check_conv, cuda_ops.conv, cuda_ops.CONFIGS[1], torch.float16, (4, 2, 6), n=1, phased=True, kb=24, affine="1 1"
)
DEEP_WGRAD = partial(check_wgrad, cuda_ops.conv_wgrad, cuda_ops.WgradConfig(1), torch.float16, (4, 2, 6), n=1, rows=1)
PHASED_WGRAD = partial(WGRAD, phased=True)
# What each fault does, and the calls that have to notice it.
CASES = {
    "halo": ("tiles begin one column late", [NODE, TWO_STAGES, WGRAD, PHASED_WGRAD]),
    "plane": ("planes are read one further on", [DEEP, DEEP_WGRAD]),
    "bounds": ("the row after the map is read", [TWO_STAGES, PHASED_WGRAD]),
    "barrier": ("no thread waits until a stage is written", [NODE, TWO_STAGES, WGRAD, PHASED_WGRAD]),
    "reuse": ("a stage is written while others read it", [NODE]),
    "wait": ("copies are not waited for", [NODE, TWO_STAGES, WGRAD]),
    "mask": ("padding is shifted by the norm", [NODE, WGRAD, PHASED_WGRAD]),
    "tail": ("one channel of the neighbour is read", [NODE, TWO_STAGES]),
    "phase": ("odd columns use the weights of even ones", [NODE, PHASED_WGRAD]),
    "unwritten": ("one row of weights is never loaded", [NODE, TWO_STAGES]),
    "reduction": ("the last partial sum is forgotten", [WGRAD, PHASED_WGRAD]),
}


@pytest.fixture(scope="module")
def emulation():
    with emulated() as emulation:
        yield emulation


def caught(emulation: Emulation, fault: str, call) -> str:
    """The error of a call's check under a fault, in the first order that gives one; "" if none does."""
    emulation.fault = fault
    try:
        for emulation.order in ORDERS:
            try:
                call()
            except (AssertionError, RuntimeError) as error:
                return str(error) or "wrong"
        return ""
    finally:
        emulation.order, emulation.fault = 0, "none"


def test_emulation_faults_are_all_tried():
    assert set(CASES) == set(FAULTS) - {"none"}


@pytest.mark.parametrize("fault", CASES)
def test_emulation_catches(emulation, fault: str):
    what, calls = CASES[fault]
    for call in calls:
        assert not caught(emulation, "none", call), "wrong without a fault"
        assert caught(emulation, fault, call), f"not noticed: {what}"


def test_emulation_names_the_stray_access(emulation):
    """The sanitizer says where; the server restarts for the next call."""
    said = caught(emulation, "bounds", TWO_STAGES)
    assert "heap-buffer-overflow" in said and ("halo_tile.h" in said or "wait_copies" in said), said
    assert not caught(emulation, "none", TWO_STAGES)


def test_emulation_names_registers_that_nobody_wrote(emulation):
    assert "reads a register that was never written" in caught(emulation, "unwritten", TWO_STAGES)


def test_emulation_names_copies_that_nobody_waits_for(emulation):
    assert "copies that it never waited for" in caught(emulation, "wait", TWO_STAGES)
