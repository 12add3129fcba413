"""The most memory that a training step takes, counted without computing anything."""

from __future__ import annotations

import pytest
import torch
from support.launches import stubbed
from support.memory import peak_of_a_step
from torch._subclasses.fake_tensor import FakeTensorMode

import unetpp_fast as uf
from unetpp_fast.execution import reference
from unetpp_fast.execution.call import Call
from unetpp_fast.execution.fused import operators, ops

pytestmark = pytest.mark.skipif(not ops.HAS_TRITON, reason="needs Triton")


def under_autocast(model: uf.Network, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        return reference.forward(model, x)


def by_the_kernels(model: uf.Network, x: torch.Tensor) -> list[torch.Tensor]:
    return operators.forward(Call(model, x, torch.bfloat16), "triton")


@pytest.mark.parametrize(("upsample", "share"), [("deconv", 0.40), ("nearest", 0.36)])
def test_the_peak_of_a_training_step(upsample, share):
    """Eight images of 512x512 in bfloat16, beside eager under autocast; gradients of parameters included."""
    with FakeTensorMode():
        model, x = uf.UNetPlusPlus(1, 1, upsample=upsample, deep_supervision=True), torch.empty(8, 1, 512, 512)
        usual = peak_of_a_step(under_autocast, model, x)
        with stubbed():
            found = peak_of_a_step(by_the_kernels, model, x)
    print(f"{upsample}: {found / usual:.4f} of eager's {usual / 1e9:.2f} GB")
    assert found <= share * usual
