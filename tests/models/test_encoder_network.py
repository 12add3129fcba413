"""UNet++ over an encoder: any module that returns a pyramid will do."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from support.helpers import FLOAT32, assert_close_relative, make_input
from torch import Tensor, nn

import unetpp_fast as uf
from unetpp_fast.architecture.topology import Topology
from unetpp_fast.models.encoder_network import EncodedNetwork

WIDTHS = (5, 6, 7)  # of the encoder's maps at 1/2, 1/4 and 1/8


class Pyramid(nn.Module):
    """The image, then a strided convolution per level."""

    def __init__(self, channels: int, spatial_dims: int):
        super().__init__()
        conv = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        widths = (channels, *WIDTHS)
        self.stages = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps


def network(spatial_dims: int = 2, **options) -> EncodedNetwork:
    torch.manual_seed(0)
    topology = Topology.nested(3, WIDTHS, spatial_dims=spatial_dims, up_width=lambda low_width, level: low_width)
    return EncodedNetwork(Pyramid(3, spatial_dims), topology, 4, 2, **options)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("options", [{}, {"upsample": "linear", "norm": None, "bias": True}], ids=str)
def test_a_pyramid_of_any_module_trains(spatial_dims, options):
    model, size = network(spatial_dims, **options), (16, 24, 16)[:spatial_dims]
    logits = model(make_input(2, 3, *size))
    assert logits.shape == (2, 2, *size)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_predict_takes_any_size_and_optimize_gives_the_same():
    model, x = network().eval(), make_input(1, 3, 17, 21)
    assert model.multiple == 8
    probabilities = model.predict(x)
    assert probabilities.shape == (1, 2, 17, 21) and 0 <= probabilities.min() <= probabilities.max() <= 1
    assert_close_relative(uf.optimize(model).predict(x), probabilities, FLOAT32)
    with pytest.raises(ValueError, match="multiple of 8"):
        model(x)
