"""A MONAI `BasicUNetPlusPlus` as a network of this package: its layout and a mapping of its weights, for the tests.

MONAI's layout, read from monai/networks/nets/basic_unetplusplus.py and blocks/upsample.py (1.6): five levels; X(0,4) is
features[5] wide; up-sampling hands over half of the low channels (rounded down), on level 0 all of them. Up-sampling
"nontrainable" puts a 1x1 `preconv` before the interpolation only where the channel count changes, that is on every level
but 0. This package's `project` has that convolution on every level, so on level 0 it becomes the identity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unetpp_fast import Network, Topology

UPSAMPLES = {"deconv": "deconv", "nontrainable": ("linear", {"align_corners": True, "project": True})}
LEVEL_0 = ("x0_1", "x0_2", "x0_3", "x0_4")


def network_like_monai(
    in_channels: int,
    out_channels: int,
    features: Sequence[int],
    *,
    spatial_dims: int,
    upsample: str,
    deep_supervision: bool,
    **options: Any,
) -> Network:
    """The network whose parameters `our_name` maps MONAI's onto."""
    topology = Topology.nested(
        in_channels,
        features[:5],
        spatial_dims=spatial_dims,
        all_heads=deep_supervision,
        widths={(0, 4): features[5]},
        up_width=lambda low_width, level: low_width // 2 if level else low_width,
    )
    return Network(topology, out_channels, upsample=UPSAMPLES[upsample], deep_supervision=deep_supervision, **options)


def our_name(name: str) -> str:
    """A key of MONAI's state_dict as a key of ours."""
    if found := re.fullmatch(r"final_conv_0_(\d)\.(\w+)", name):
        return f"heads.x0_{found[1]}.{found[2]}"
    if found := re.fullmatch(r"upcat_(\d)_(\d)\.upsample\.(deconv|preconv)\.(\w+)", name):
        part = "up" if found[3] == "deconv" else "up.project"
        return f"nodes.x{found[1]}_{found[2]}.{part}.{found[4]}"
    if found := re.fullmatch(r"(?:conv|upcat)_(\d)_(\d)\.(?:convs\.)?conv_(\d)\.(conv|adn\.N)\.(\w+)", name):
        part = {"conv": "conv", "adn.N": "norm"}[found[4]]
        return f"nodes.x{found[1]}_{found[2]}.{part}{int(found[3]) + 1}.{found[5]}"
    raise KeyError(f"no such weight in MONAI's BasicUNetPlusPlus: {name}")


def without_counterpart(network: Network) -> set[str]:
    """Our parameters that MONAI does not have: level 0's 1x1 convolutions, which must be the identity."""
    names = {f"nodes.{node}.up.project.{what}" for node in LEVEL_0 for what in ("weight", "bias")}
    return names & set(network.state_dict())


def renamed(values: dict[str, Tensor], network: Network) -> dict[str, Tensor]:
    """`values` by our names, without the heads that MONAI keeps and never runs when it has one output."""
    unused = {f"heads.{node}" for node in LEVEL_0} - {f"heads.{name}" for name in network.heads}
    return {our_name(k): value for k, value in values.items() if our_name(k).rpartition(".")[0] not in unused}


@torch.no_grad()
def carry_over(monai: nn.Module, network: Network) -> None:
    """Copies every weight and running statistic of `monai` into `network`, which must have exactly those."""
    state = renamed(monai.state_dict(), network)
    for name in without_counterpart(network):
        value = network.state_dict()[name]
        if name.endswith("weight"):
            state[name] = torch.eye(len(value)).view(value.shape)
        else:
            state[name] = torch.zeros_like(value)
    network.load_state_dict({name: value.clone() for name, value in state.items()}, strict=True)
