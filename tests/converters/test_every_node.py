"""`explain` names a kernel for every node of the peers' networks."""

from __future__ import annotations

import re

import pytest
import torch
from support import cpu_kernels
from support.helpers import build, make_input
from support.peer_models import NestedUNet, NnUnet, UnetPlusPlus
from torch import nn

import unetpp_fast as uf
from unetpp_fast.execution import dispatch


def monai(upsample: str) -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    act = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
    return nets.BasicUNetPlusPlus(2, 3, 2, (4, 4, 8, 12, 16, 6), act=act, norm="batch", upsample=upsample)


PEERS = {
    "monai deconv": (lambda: monai("deconv"), 15),
    "monai nontrainable": (lambda: monai("nontrainable"), 15),
    "monai pixelshuffle": (lambda: monai("pixelshuffle"), 15),
    "pytorch-nested-unet": (lambda: NestedUNet(2, 3), 15),
    "unet-zoo": (lambda: NestedUNet(2, 3, zoo=True, deep_supervision=True), 15),
    "nnunet": (lambda: NnUnet(3, 2), 21),
    "smp": (lambda: UnetPlusPlus(3, 2), 16),
    "smp scse": (lambda: UnetPlusPlus(3, 2, attention="scse"), 16),
}


@cpu_kernels.needs_library()
@pytest.mark.parametrize("name", PEERS)
def test_a_kernel_for_every_node(name, monkeypatch):
    monkeypatch.setattr(dispatch.ops, "INTERPRETED", False)
    make, count = PEERS[name]
    ours, x = uf.convert(build(make)).eval(), make_input(1, 3, 64, 64)
    ours.backend = "cpu"
    with torch.no_grad():
        first, *nodes = uf.explain(ours, x).splitlines()
    assert ": cpu (asked for)" in first
    assert [line.split()[0] for line in nodes] == ["cpu"] * count
    positions = [re.match(r"cpu +X\((\d),(\d)\) ", line).groups() for line in nodes]
    assert len(set(positions)) == count and set(positions) == {
        (str(node.level), str(node.column)) for node in ours.engine_input(x)[0].topology.nodes
    }
