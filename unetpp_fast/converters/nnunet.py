"""nnU-Net++'s `Generic_UNetPlusPlus`: six levels, 2D and 3D, strided convolutions between them, instance or batch norm.

Transposed convolutions have no bias, and heads usually have none. Its class always builds five heads; a state_dict is
converted to what its trainers use: logits and deep supervision. Strides of 1 or 2 and kernels of 1 or 3 may differ between
axes, as plans for anisotropic volumes have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..architecture.topology import Node, Topology
from ..models.network import Network
from .peer import Peer, State, act_option, build, check_widths, nest, norm_of_names, norm_option, read_topology, same

DEPTH = 5


class NnUnet(Peer):
    name = "nnunet"
    title = "nnU-Net++ Generic_UNetPlusPlus"
    keys = r"(conv_blocks_context\.\d|loc\d\.\d|up\d\.\d|seg_outputs\.\d)\."
    open_options = ("act", "norm", "deep_supervision")

    def module(self, node: Node, part: str) -> str | None:
        i, j = node.position
        if part == "up":
            return f"up{DEPTH - i - j}.{j - 1}"
        block = int(part[-1]) - 1
        layer = "conv" if part.startswith("conv") else "instnorm"
        if j:
            return f"loc{DEPTH - i - j}.{j - 1}.{block}.blocks.0.{layer}"
        bottom = i == DEPTH
        return f"conv_blocks_context.{i}.{f'{block}.blocks.0' if bottom else f'blocks.{block}'}.{layer}"

    def head(self, column: int, topology: Topology) -> str:
        return f"seg_outputs.{DEPTH - column}"

    def read(self, state: State, given: Mapping[str, Any]) -> Network:
        if any(name.startswith(("conv_blocks_context.0.blocks.2.", "loc0.0.0.blocks.1.")) for name in state):
            raise self.fail("it has more than two convolutions per node (num_conv_per_stage)")
        if any(name.startswith(f"conv_blocks_context.{DEPTH + 1}.") for name in state):
            raise self.fail("it has more than six levels, which its own forward pass does not run")
        topology = read_topology(self, state, nest(DEPTH), tuple(range(1, DEPTH + 1)))
        check_widths(self, topology, lambda low, width, level: width)
        topology = self._with_shapes(topology, state)
        several = bool(given.get("deep_supervision", True))
        forms = {"plain": "deepest_first", "softmax": "softmax_deepest_first"}
        return build(
            topology,
            self.tensor(state, "seg_outputs.0.weight").shape[0],
            norm=norm_of_names(self, state, "conv_blocks_context.0.blocks.0.instnorm", given),
            act=given.get("act", ("leaky_relu", {"negative_slope": 0.01})),
            upsample=("deconv", {"bias": False}),
            deep_supervision=several,
            downsample="stride",
            head_bias="seg_outputs.0.bias" in state,
            form=forms[given.get("final", "plain")],
        )

    def _with_shapes(self, topology: Topology, state: State) -> Topology:
        """The topology with the strides and kernels of these weights."""
        nodes, strides = [], {}
        for node in topology.nodes:
            names = [f"{self.module(node, part)}.weight" for part in ("conv1", "conv2")]
            kernel = same(self, [tuple(self.tensor(state, name).shape[2:]) for name in names], f"the kernels of {names}")
            if not set(kernel) <= {1, 3}:
                raise self.fail(
                    f"{names[0]} has a {'x'.join(map(str, kernel))} kernel; unetpp_fast has 3 and 1 along an axis"
                )
            nodes.append(dataclasses.replace(node, kernel=None if set(kernel) == {3} else kernel))
            if node.column:
                shape = tuple(self.tensor(state, f"{self.module(node, 'up')}.weight").shape[2:])
                strides.setdefault(node.level, []).append(shape)
        levels = [same(self, strides[level], f"the strides below level {level}") for level in range(topology.depth)]
        if any(self.tensor(state, f"seg_outputs.{place}.weight").shape[2:].numel() != 1 for place in range(DEPTH)):
            raise self.fail("its heads have kernels of more than one pixel")
        try:
            return dataclasses.replace(topology.over_levels(levels), nodes=tuple(nodes))
        except ValueError as error:
            raise self.fail(str(error)) from error

    def inspect(self, module: nn.Module) -> dict[str, Any]:
        blocks = [block for block in module.modules() if hasattr(block, "instnorm") and hasattr(block, "lrelu")]
        for block in blocks:
            dropout = getattr(block, "dropout", None)
            if dropout is not None and dropout.p > 0:
                raise self.fail(
                    f"it drops whole channels before the norm (p = {dropout.p}), which unetpp_fast does not: for a network"
                    " without dropout, set p to 0 or convert its state_dict"
                )
        if getattr(module, "upscale_logits", False):
            raise self.fail("upscale_logits=True enlarges the outputs")
        return {
            "norm": same(self, [norm_option(self, block.instnorm) for block in blocks], "norm"),
            "act": same(self, [act_option(self, block.lrelu) for block in blocks], "activation"),
            "deep_supervision": bool(module._deep_supervision and module.do_ds),
            "final": self._final(module.final_nonlin),
        }

    def _final(self, function: Any) -> str:
        probe = torch.linspace(-2.0, 3.0, 12).reshape(1, 3, 2, 2)
        result = function(probe.clone())
        for name, expected in (("plain", probe), ("softmax", probe.softmax(dim=1))):
            if torch.allclose(result, expected):
                return name
        raise self.fail("its final_nonlin is neither the identity nor a softmax over the classes")
