"""Networks over stand-ins for encoders: maps with negative values, widths and depths of any kind."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from support.fused_cases import run_fused
from support.helpers import assert_close_relative, assert_gradients_close, build, gradients, make_input, weighted_sum
from support.margin import MARGIN, Margin
from torch import Tensor, nn
from torch.nn import functional as F

from unetpp_fast.architecture.topology import Topology
from unetpp_fast.execution import reference
from unetpp_fast.models.encoder_network import EncodedNetwork

WIDTHS = {1: (5, 3), 2: (5, 6, 7), 3: (3, 5, 2, 4), 4: (2, 3, 5, 4, 3)}  # by the depth of the nest
OWN_WIDTHS = {(0, 1): 4, (1, 1): 9, (0, 2): 3}  # of nodes beside their level's others


class Pyramid(nn.Module):
    """The image, then a strided convolution, a batch norm and a GELU per level; with `starts_lower` the first of these maps
    is given without channels."""

    def __init__(self, channels: int, widths: tuple[int, ...], axes: int, starts_lower: bool = False):
        super().__init__()
        self.starts_lower = starts_lower
        conv, norm = ((nn.Conv2d, nn.BatchNorm2d), (nn.Conv3d, nn.BatchNorm3d))[axes - 2]
        self.convs = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in pairwise((channels, *widths)))
        self.norms = nn.ModuleList(norm(width) for width in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [x]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            maps.append(F.gelu(norm(conv(maps[-1]))))
        if self.starts_lower:
            maps[1] = maps[1][:, :0]
        return maps


def encoded(depth: int = 2, axes: int = 2, channels: int = 3, starts_lower: bool = False, **options) -> EncodedNetwork:
    """A network with `depth` + 1 maps of an encoder, one less if it `starts_lower`, whose nodes have widths of their own."""
    widths = WIDTHS[depth]
    topology = Topology.nested(
        channels,
        widths,
        spatial_dims=axes,
        all_heads=options.get("deep_supervision", False),
        up_width=lambda low_width, level: low_width,
        widths={position: width for position, width in OWN_WIDTHS.items() if sum(position) <= depth},
    )
    topology = topology.without_finest_map() if starts_lower else topology
    return build(lambda: EncodedNetwork(Pyramid(channels, widths, axes, starts_lower), topology, 4, 2, **options))


def by(ops: str):
    """Logits of a network over an encoder by the engine with these ops, or the "reference"."""
    run = reference.forward if ops == "reference" else run_fused(ops)
    return lambda model, x: run(model.nest, model.maps(x))


@torch.no_grad()
def image(model: EncodedNetwork, batch: int = 2, lowest: tuple[int, int, int] = (2, 3, 2)) -> Tensor:
    """The first image whose gradients do not depend on rounding; `lowest`: pixels of the lowest level."""
    topology = model.topology
    size = [side * model.multiple for side in lowest[: topology.spatial_dims]]
    for seed in range(100):
        x = make_input(batch, topology.in_channels, *size, seed=seed)
        with Margin() as margin:
            by("reference")(copy.deepcopy(model).double(), x.double())
        if margin.least > MARGIN:
            return x
    raise AssertionError("every image has values too near to a choice")


def assert_same(model: EncodedNetwork, x: Tensor, ops: str, bound: float) -> None:
    """Against the reference in float64: outputs, gradients of the image and of every parameter, the encoder's too, and
    running statistics; then outputs without gradients, in eval mode too."""
    exact, results = copy.deepcopy(model).double(), []
    for net, run, values in ((exact, by("reference"), x.double()), (model, by(ops), x)):
        mine = values.detach().clone().requires_grad_()
        outputs = run(net, mine)
        weighted_sum(outputs).backward()
        results.append((outputs, mine.grad, gradients(net), dict(net.named_buffers())))
    (outputs, gx, of_parameters, buffers), (actual, actual_gx, actual_of_parameters, actual_buffers) = results
    assert len(of_parameters) == len([one for one in model.parameters() if one.requires_grad])
    assert_close_relative(actual, outputs, bound)
    assert_close_relative(actual_gx, gx, bound)
    assert_gradients_close(actual_of_parameters, of_parameters, bound)
    for name, buffer in buffers.items():
        assert_close_relative(actual_buffers[name].double(), buffer.double(), bound)
    for train in (model.training, False):
        with torch.no_grad():
            outputs = by("reference")(exact.train(train), x.double())
            assert_close_relative(by(ops)(model.train(train), x), outputs, bound)
