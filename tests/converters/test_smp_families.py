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
from support.smp_networks import of_smp
from torch import Tensor, nn

import unetpp_fast as uf
from unetpp_fast.converters.smp import Smp

BOUND = 1.5  # times the error of smp's own float32, in its farther layout
BOUND_WINOGRAD = 3.0  # Winograd's transforms round more: gradients up to 2.4 times smp's error
ROUNDING = 1e-5  # above it a choice fell the other way in smp's own

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


def usual_passes(model: nn.Module, x: Tensor) -> list[dict[str, Tensor]]:
    """smp's in float64, in float32, and in float32 channels-last."""
    exact, usual, laid_out = copy.deepcopy(model).double(), copy.deepcopy(model), copy.deepcopy(model)
    laid_out, last = laid_out.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return [passes(exact, exact, x.double()), passes(usual, usual, x), passes(laid_out, laid_out, last)]


def error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """Relative errors of the output and of all gradients, in the Euclidean norm."""
    assert set(found) == set(exact)
    squares = {
        name: ((found[name] - value).square().sum().item(), value.square().sum().item()) for name, value in exact.items()
    }
    off, size = squares.pop("output")
    offs, sizes = map(sum, zip(*squares.values(), strict=True))
    return (off / size) ** 0.5, (offs / sizes) ** 0.5


@pytest.mark.parametrize("case", FAMILIES, ids=lambda case: case[0])
def test_a_family_in_float32(case: tuple, monkeypatch) -> None:
    """On one of a few images: on some, by chance, a value's sign or a maximum's place depends on rounding."""
    theirs = of_smp(*case)
    ours = uf.convert(theirs)
    pairs = {pair.ours: pair for pair in Smp().pairs(ours)}
    runs = [("reference", BOUND, None), ("cpu", BOUND, "direct"), ("cpu", BOUND_WINOGRAD, "winograd")]
    if ours.nest.structure is None or not cpu_kernels.has_library():  # gates have no engine
        runs = runs[:1]
    missed = []
    for seed in range(4):
        exact, *usual = usual_passes(theirs, make_input(2, case[2], 64, 64, seed=seed))
        bounds = [max(errors) for errors in zip(*(error(one, exact) for one in usual), strict=True)]
        if max(bounds) > ROUNDING:
            missed.append(("smp", bounds))
            continue
        here = []
        for backend, bound, kernel in runs:
            if kernel:
                cpu_kernels.select(kernel, monkeypatch.setattr)
            network = copy.deepcopy(ours)
            found = passes(network, partial(first, backend, network), make_input(2, case[2], 64, 64, seed=seed))
            found = {
                pairs[n].theirs if n in pairs else n: pairs[n].to_theirs(v) if n in pairs else v for n, v in found.items()
            }
            mine = error(found, exact)
            if any(one > bound * own for one, own in zip(mine, bounds, strict=True)):
                here.append((backend, kernel, mine, bounds))
        if not here:
            return
        missed += here
    raise AssertionError(missed)
