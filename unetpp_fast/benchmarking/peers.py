"""MONAI's and smp's own UNet++, with the weights of the network that was converted from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..models.network import Network
from .case import Case, Prepared, load, prepare

MONAI_LEVELS = 5


def monai_module(in_channels: int, out_channels: int, widths: Sequence[int], spatial_dims: int = 2) -> nn.Module:
    """MONAI's UNet++ with instance norm, as MONAI builds it; `widths` are those of its five levels."""
    networks = load("monai.networks.nets", "bench")
    features = (*widths, widths[0])
    return networks.BasicUNetPlusPlus(spatial_dims, in_channels, out_channels, features, deep_supervision=True)


def smp_module(in_channels: int, out_channels: int) -> nn.Module:
    """smp's UNet++ on a ResNet-34, with random weights."""
    smp = load("segmentation_models_pytorch")
    return smp.UnetPlusPlus("resnet34", encoder_weights=None, in_channels=in_channels, classes=out_channels)


def monai(network: Network, x: Tensor, case: Case) -> Prepared:
    """MONAI's module with the widths of `network`; if that has fewer levels, the last width is repeated."""
    widths = [network.topology[level, 0].width for level in range(network.topology.depth + 1)]
    widths += [widths[-1]] * (MONAI_LEVELS - len(widths))
    channels = network.topology.in_channels, network.out_channels
    return _seeded(lambda: monai_module(*channels, widths, network.topology.spatial_dims), x, case)


def smp(network: Network, x: Tensor, case: Case) -> Prepared:
    """smp's module with the channels of `network`."""
    return _seeded(lambda: smp_module(network.topology.in_channels, network.out_channels), x, case)


def _seeded(make: Callable[[], nn.Module], x: Tensor, case: Case) -> Prepared:
    """A peer's module, made with the seed with which `benchmarks/cases.py` made the one that it converted."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = make().to(x.device)
    prepared = prepare(module, x, case)
    prepared.ours = False
    return prepared
