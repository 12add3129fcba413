"""ncnn and MNN run the networks that are compared, and say why where they cannot."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import unetpp_fast as uf
from unetpp_fast.benchmarking import harness
from unetpp_fast.benchmarking.case import Case, Unavailable
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS

CPU = torch.device("cpu")
CASE = Case("inference", "unet++", 2, "accurate", (32, 48), 2, "float32")
NAMES = ("ncnn", "mnn")


def network(upsample: str) -> uf.Network:
    torch.manual_seed(0)
    return uf.UNetPlusPlus(1, 1, features=(4, 6, 8), norm=None, upsample=upsample, deep_supervision=True).eval()


@pytest.mark.parametrize("upsample", ["deconv", "nearest"])
@pytest.mark.parametrize("name", NAMES)
def test_every_image_and_head(name, upsample):
    for module in IMPLEMENTATIONS[name].needs:
        pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)
    outcome = harness.measure(CASE, network(upsample), {name: IMPLEMENTATIONS[name]}, CPU, rounds=1)
    assert not outcome.wrong and not outcome.skipped
    assert outcome.rows[0]["error"] < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_what_they_do_not_run(name):
    for module in IMPLEMENTATIONS[name].needs:
        pytest.importorskip(module, reason=f"{module} is not installed", exc_type=ImportError)
    for change in ({"dtype": "bfloat16"}, {"bench": "training"}):
        case = dataclasses.replace(CASE, **change)
        with pytest.raises(Unavailable):
            IMPLEMENTATIONS[name](network("nearest"), torch.rand(2, 1, 32, 48), case)
