"""The feature pyramid of a network: which maps it gives, of what size and width, and that they train the model."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from support.helpers import FLOAT64, assert_close_relative, build, make_input, weighted_sum

import unetpp_fast as uf
from unetpp_fast.architecture.topology import Node, Topology
from unetpp_fast.execution import reference
from unetpp_fast.models.network import Network

WIDTHS = (4, 6, 8, 10, 12)


def test_the_maps_are_those_of_the_last_diagonal_finest_first():
    model = build(uf.UNetPlusPlus, 2, 3, features=(4,) * 5).double().eval()
    x = make_input(2, 2, 32, 48, dtype=torch.float64)
    pyramid = uf.backbone(model)
    maps = pyramid(x)
    assert isinstance(maps, OrderedDict) and list(maps) == ["0", "1", "2", "3", "4"]
    every = reference.node_maps(model, x)
    for level, values in enumerate(maps.values()):
        assert torch.equal(values, every[level, 4 - level])
        assert values.shape == (2, 4, 32 >> level, 48 >> level)
    assert pyramid.out_channels == 4
    assert_close_relative(model.heads["x0_4"](maps["0"]), model(x), FLOAT64)


@pytest.mark.parametrize(("asked", "given"), [(None, 256), (5, 5)])
def test_maps_of_different_widths_are_brought_to_one(asked, given):
    model = build(uf.UNetPlusPlus, 1, features=WIDTHS).double().eval()
    pyramid = uf.backbone(model, asked).double()
    x = make_input(1, 1, 16, 32, dtype=torch.float64)
    maps, every = pyramid(x), reference.node_maps(model, x)
    assert pyramid.out_channels == given and all(values.shape[1] == given for values in maps.values())
    for level, values in enumerate(maps.values()):
        weight, bias = pyramid.lateral[level].weight[:, :, 0, 0], pyramid.lateral[level].bias
        expected = torch.einsum("oc,nchw->nohw", weight, every[level, 4 - level]) + bias[:, None, None]
        assert_close_relative(values, expected, FLOAT64)


@pytest.mark.parametrize(
    ("make", "dims", "count"),
    [
        (lambda: build(uf.UNet, 1, features=WIDTHS), 2, 5),
        (lambda: build(uf.UNetPlusPlus, 1, features=WIDTHS, deep_supervision=True).prune(2), 2, 3),
        (lambda: build(uf.UNetPlusPlus, 1, features=(4, 6, 8), spatial_dims=3), 3, 3),
    ],
    ids=["unet", "pruned", "3d"],
)
def test_every_kind_of_network_has_a_pyramid(make, dims, count):
    maps = uf.backbone(make(), 7)(torch.rand(1, 1, *[32] * dims))
    assert [tuple(values.shape) for values in maps.values()] == [(1, 7, *[32 >> level] * dims) for level in range(count)]


def test_training_it_trains_the_nodes_of_the_model_and_nothing_is_left_out():
    model = build(uf.UNetPlusPlus, 1, features=(4, 6, 8), deep_supervision=True)
    pyramid = uf.backbone(model, 3).train()
    weighted_sum(list(pyramid(make_input(2, 1, 8, 8)).values())).backward()
    assert all(parameter.grad is not None for parameter in pyramid.parameters())
    assert pyramid.network.nodes["x0_1"] is model.nodes["x0_1"]
    assert all(parameter.grad is not None for parameter in model.nodes.parameters())
    assert all(parameter.grad is None for parameter in model.heads.parameters())


def test_its_weights_can_be_saved_and_moved():
    one, other = (uf.backbone(build(uf.UNetPlusPlus, 1, features=(4, 6), seed=seed), 3).eval() for seed in (0, 1))
    other.load_state_dict(one.state_dict())
    x = make_input(1, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(one(x).values(), other(x).values(), strict=True))
    assert uf.backbone(build(uf.UNet, 1, features=(4, 6))).half().lateral[0].weight.dtype == torch.float16


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="every axis must be a positive multiple of 4"):
        uf.backbone(build(uf.UNetPlusPlus, 1, features=(4, 6, 8)))(torch.rand(1, 1, 8, 10))
    nodes = (Node(0, 0, 4), Node(1, 0, 4), Node(2, 0, 4), Node(0, 1, 4, (0,), 4))
    with pytest.raises(ValueError, match=r"has no node X\(0, 2\): a pyramid needs"):
        uf.backbone(Network(Topology(1, 2, nodes, (1,))))
