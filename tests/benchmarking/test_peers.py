"""Peers' own networks as implementations."""

from __future__ import annotations

import pytest
import torch

from unetpp_fast.benchmarking import harness, peers
from unetpp_fast.benchmarking.case import Case
from unetpp_fast.models.architectures import UNet


def test_monai_is_built_for_a_network_with_fewer_levels():
    """As in the warm-up before its memory is measured."""
    pytest.importorskip("monai.networks.nets", reason="monai is not installed", exc_type=ImportError)
    size = (harness.WARM_UP_SIZE,) * 2
    case = Case("training", "monai-unet++", 4, "accurate", size, 1, "float32")
    prepared = peers.monai(UNet(1, 2, features=(2, 2)), torch.rand(1, 1, *size), case)
    harness.Pass(prepared, case, 1)()
    assert not prepared.ours and [output.shape for output in prepared.forward(prepared.x)] == [(1, 2, *size)] * 4
