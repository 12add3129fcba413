"""MONAI's `BasicUNetPlusPlus`: 2D and 3D, any of its up-samplings, batch, instance or group norm, ReLUs, GELU and swish.

From monai/networks/nets/basic_unetplusplus.py and blocks/upsample.py (1.6). Five levels; X(0,4) is features[5] wide;
up-sampling halves the number of channels (rounded down), except on level 0, where it keeps them. "nontrainable" has a 1x1
convolution before the interpolation only if the number of channels changes, that is on every level but 0: there ours is a
frozen identity. All four heads always exist; without deep supervision only the last one runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.options import ACTIVATIONS, parse_option
from ..architecture.topology import Node, Topology
from ..models.network import Network
from .peer import Peer, State, act_option, build, check_widths, nest, norm_of_names, norm_option, read_topology, same

UPSAMPLES = {
    "deconv": "deconv",
    "preconv": ("linear", {"align_corners": True, "project": True}),
    "pixelshuffle.conv_block": "pixelshuffle",
}
PARTS = {"up": "deconv", "up.project": "preconv", "up.conv": "pixelshuffle.conv_block"}


class Monai(Peer):
    name = "monai"
    title = "MONAI BasicUNetPlusPlus"
    keys = r"(conv_\d_0\.(convs\.)?conv_[01]|upcat_\d_\d\.(upsample|convs)|final_conv_0_\d)\."
    open_options = ("act", "norm", "dropout", "deep_supervision")

    def module(self, node: Node, part: str) -> str | None:
        i, j = node.position
        if part.startswith("up"):
            if part == "up.project" and i == 0:
                return None
            return f"upcat_{i}_{j}.upsample.{PARTS[part]}"
        place = f"upcat_{i}_{j}.convs" if j else f"conv_{i}_0.convs" if i else "conv_0_0"
        if part.startswith("act"):
            return f"{place}.conv_{1 if part == 'act2' else 0}.adn.A"
        return f"{place}.conv_{int(part[-1]) - 1}.{'conv' if part.startswith('conv') else 'adn.N'}"

    def head(self, column: int, topology: Topology) -> str:
        return f"final_conv_0_{column}"

    def read(self, state: State, given: Mapping[str, Any]) -> Network:
        several = bool(given.get("deep_supervision", False))
        topology = read_topology(self, state, nest(4), (1, 2, 3, 4) if several else (4,))
        kinds = [name for name in UPSAMPLES if f"upcat_3_1.upsample.{name}.weight" in state]
        if len(kinds) != 1:
            raise self.fail(
                "its up-sampling is neither deconv nor nontrainable nor pixelshuffle, or its weights are missing"
            )
        check_widths(self, topology, lambda low, width, level: low // 2 if level else low, free=[(0, 4)])
        act = given.get("act", ("leaky_relu", {"negative_slope": 0.1}))
        name = parse_option(act, "act", ACTIVATIONS)[0]
        if given.get("dropout", 0.0) > 0 and not ACTIVATIONS[name].scales:
            raise self.fail(f"it drops values before the activation, unetpp_fast after it, which is not the same for {name}")
        return build(
            topology,
            self.tensor(state, "final_conv_0_4.weight").shape[0],
            norm=norm_of_names(self, state, "conv_0_0.conv_0.adn.N", given),
            act=act,
            upsample=UPSAMPLES[kinds[0]],
            dropout=given.get("dropout", 0.0),
            bias="conv_0_0.conv_0.conv.bias" in state,
            deep_supervision=several,
            odd_sizes=True,
            form="always_list",
            spare_heads=() if several else (1, 2, 3),
        )

    def constants(self, network: Network) -> dict[str, Tensor]:
        """The 1x1 convolutions on level 0, which MONAI does not have, as identities."""
        own, values = network.state_dict(), {}
        for node in network.topology.nodes:
            name = f"nodes.{node.name}.up.project"
            if node.level == 0 and f"{name}.weight" in own:
                shape = own[f"{name}.weight"].shape
                values[f"{name}.weight"] = torch.eye(*shape[:2]).reshape(shape)
                values[f"{name}.bias"] = torch.zeros(shape[0])
        return values

    def inspect(self, module: nn.Module) -> dict[str, Any]:
        names = ("conv_0", "conv_1")
        blocks = [block for name, block in module.named_modules() if name.rpartition(".")[2] in names]
        for block in blocks:
            layers = list(block.adn._modules) if "adn" in block._modules else []
            if "A" not in layers or layers != [layer for layer in "NDA" if layer in layers]:
                raise self.fail(f"the layers after a convolution are {layers}, expected norm, dropout, activation")
            if "D" in layers and type(block.adn.D) is not nn.Dropout:
                raise self.fail(f"its dropout is {type(block.adn.D).__name__}; unetpp_fast has nn.Dropout")
        norms = [norm_option(self, block.adn.N) if "N" in block.adn._modules else None for block in blocks]
        return {
            "norm": same(self, norms, "norm"),
            "act": same(self, [act_option(self, block.adn.A) for block in blocks], "activation"),
            "dropout": same(self, [block.adn.D.p if "D" in block.adn._modules else 0.0 for block in blocks], "dropout"),
            "deep_supervision": module.deep_supervision,
        }
