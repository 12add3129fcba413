"""smp's networks over eight families of encoders, in float64: outputs and the gradients of every parameter are smp's.

By the reference and by the engine, with and without gates, both interpolations, 1 to 4 channels, depths 3 to 5. A few of the
cases by default; `UNETPP_FAST_ALL_ENCODERS=1 pytest tests/converters/test_smp_grid.py` runs every one.
"""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from support.encoders import by
from support.helpers import assert_close_relative, assert_gradients_close, gradients, make_input, weighted_sum
from support.smp_networks import of_smp

import unetpp_fast as uf
from unetpp_fast.converters.smp import Smp

BOUND = 1e-8  # float64 gradients through the tens of normalised layers of an encoder
FAMILIES = (
    "resnet18", "resnext50_32x4d", "efficientnet-b0", "mobilenet_v2", "vgg11_bn", "densenet121", "mit_b0",
    "tu-convnext_atto",
)  # fmt: skip
EVERY = list(itertools.product(FAMILIES, (3, 4, 5), (1, 2, 3, 4), (None, "scse"), ("nearest", "bilinear")))
FEW = [
    ("mit_b0", 5, 3, None, "nearest"), ("mit_b0", 3, 1, "scse", "bilinear"), ("tu-convnext_atto", 4, 2, "scse", "nearest"),
    ("resnext50_32x4d", 3, 4, None, "bilinear"),
]  # fmt: skip


@pytest.mark.parametrize("case", EVERY if os.environ.get("UNETPP_FAST_ALL_ENCODERS") == "1" else FEW, ids=str)
def test_outputs_and_gradients_are_those_of_smp(case: tuple) -> None:
    theirs = of_smp(*case).double()
    x = make_input(1, case[2], 32, 64, dtype=torch.float64)
    expected = theirs(x)
    weighted_sum([expected]).backward()
    names = {pair.theirs: pair for pair in Smp().pairs(uf.convert(theirs))}
    ordered = {names[name].ours: names[name].to_ours(gradient) for name, gradient in gradients(theirs).items()}
    for ops in ("reference", "naive"):
        ours = uf.convert(theirs)
        if ops == "naive" and ours.nest.structure is None:
            continue
        output = by(ops)(ours, x)[0]
        weighted_sum([output]).backward()
        assert_close_relative(output, expected, BOUND)
        assert_gradients_close(gradients(ours), ordered, BOUND)
