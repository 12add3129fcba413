"""The families of encoders that smp has, in float32: a converted network is about as near to float64 as smp's own.

For outputs and the gradients of every parameter, the encoder's too, by the reference and by the CPU kernels.
Of mit and tu-convnext the first map has no channels.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from support import cpu_kernels
from support.encoders import by
from support.helpers import gradients, make_input, weighted_sum
from support.settled import randomise_norms, settle
from support.smp_networks import of_smp
from torch import Tensor, nn

import unetpp_fast as uf
from unetpp_fast.converters.smp import Smp

LAST = torch.channels_last
BOUND = 1.5  # times the error of smp's own float32: the root of the mean square over its two memory formats

# 1 to 4 channels, depths 3 to 5, both interpolations with and without gates; random paths are off in eval mode.
FAMILIES = [
    ("resnet18", 4, 1, None, "nearest"), ("resnext50_32x4d", 3, 2, None, "bilinear"),
    ("efficientnet-b0", 5, 4, None, "nearest"), ("mobilenet_v2", 5, 3, "scse", "bilinear"),
    ("vgg11_bn", 3, 1, "scse", "nearest"), ("densenet121", 3, 3, None, "nearest"),
    ("tu-resnet18", 3, 2, None, "bilinear"), ("mit_b0", 4, 3, None, "bilinear"), ("tu-convnext_atto", 5, 1, None, "nearest"),
]  # fmt: skip


def passes(model: nn.Module, run, x: Tensor) -> dict[str, Tensor]:
    """The output and the gradients, in float64."""
    output = run(x)
    weighted_sum([output]).backward()
    return {"output": output.detach().double(), **{name: value.double() for name, value in gradients(model).items()}}


def first(backend: str, network: nn.Module, x: Tensor) -> Tensor:
    return by(backend)(network, x)[0]


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """Relative errors in the Euclidean norm: of the output, and the root of the mean square of those of all gradients."""
    assert set(found) == set(exact)
    errors = {name: ((found[name] - value).norm() / value.norm()).item() for name, value in exact.items() if value.any()}
    output = errors.pop("output")
    return output, (sum(one**2 for one in errors.values()) / len(errors)) ** 0.5


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case[0])
def test_a_family_in_float32(case: tuple, monkeypatch) -> None:
    """With weights as training leaves them, and for an image for which no gradient depends on rounding (`settle`)."""
    theirs, x = of_smp(*case), make_input(2, case[2], 64, 64)
    settle(randomise_norms(theirs, x), x)
    exact = copy.deepcopy(theirs).double()
    expected = passes(exact, exact, x.double())
    laid_out, last = copy.deepcopy(theirs).to(memory_format=LAST), x.to(memory_format=LAST)
    usual = error(passes(laid_out, laid_out, last), expected), error(passes(theirs, theirs, x), expected)
    bounds = [BOUND * ((one**2 + other**2) / 2) ** 0.5 for one, other in zip(*usual, strict=True)]
    ours = uf.convert(theirs)
    pairs = {pair.ours: pair for pair in Smp().pairs(ours)}
    runs = [("reference", ""), ("cpu", ""), ("cpu", "direct")]
    if ours.nest.structure is None or not cpu_kernels.has_library():  # gates have no engine
        runs = runs[:1]
    for backend, kernel in runs:
        if kernel:
            cpu_kernels.select(kernel, monkeypatch.setattr)
        network = copy.deepcopy(ours)
        found = passes(network, partial(first, backend, network), x)
        found = {pairs[n].theirs if n in pairs else n: pairs[n].to_theirs(v) if n in pairs else v for n, v in found.items()}
        output, slopes = error(found, expected)
        assert output <= bounds[0] and slopes <= bounds[1], (backend, kernel, output, slopes, bounds)
