"""`UnetPlusPlus` of segmentation_models_pytorch (smp) and of its 3D port, with any encoder, which is copied unchanged.

Block `x_{d}_{l}` of the decoder is X(i,j) with i = depth - 1 - l and j = l - d + 1; level 0 has half the size of the image.
Its first convolution reads the up-sampled map, then X(i,j-1) to X(i,0). Block `x_0_{depth}` has no skip connection. The
module itself is needed: a state_dict does not hold the encoder's code.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..architecture.options import Option
from ..architecture.topology import Node, Topology
from ..models.encoder_network import EncodedNetwork
from ..models.encoder_parts import Encoder
from .peer import Pair, Peer, act_option, fill, input_order, nest, norm_option, same

GATES = {"squeeze": "cSE.1", "excite": "cSE.3", "pixel": "sSE.0"}
KEPT = {"encoder": "encoder", "unused": "decoder.center", "heads": "segmentation_head.0"}
FINALS = {nn.Identity: "plain", nn.Sigmoid: "sigmoid", nn.Softmax: "softmax"}


class Smp(Peer):
    name = "smp"
    title = "segmentation_models_pytorch UnetPlusPlus"
    keys = r"(encoder\.|decoder\.(blocks\.x_\d_\d|center)\.|segmentation_head\.)"
    order = "up, descending"
    model = EncodedNetwork
    needs_module = "a state_dict does not hold the encoder's code: load it into the smp model and give that"

    def claims(self, names: Iterable[str]) -> int:
        names = list(names)
        return super().claims(names) if any(name.startswith("decoder.blocks.x_") for name in names) else 0

    def convert(self, module: nn.Module) -> EncodedNetwork:
        """The converted network, with a copy of the module's encoder."""
        decoder, head = module.decoder, module.segmentation_head
        if getattr(module, "classification_head", None) is not None:
            raise self.fail("aux_params: the classification head has no counterpart; set model.classification_head = None")
        depth = max(int(name.rpartition("_")[2]) for name in decoder.blocks)
        blocks = {name: block for name, block in decoder.blocks.items() if block.conv1 is not None}  # without channels
        widths = list(module.encoder.out_channels)[1:]
        if len(widths) != depth + 1 or 0 in widths[1:]:
            raise self.fail(
                f"its encoder gives maps of {widths} channels, and its decoder has {depth} levels above the lowest"
            )
        # The first map of some encoders is not the image.
        in_channels = getattr(module.encoder, "_in_channels", module.encoder.out_channels[0])
        topology = self._topology(blocks, depth, widths, in_channels)
        layers = [layer for block in blocks.values() for layer in (block.conv1, block.conv2)]
        with torch.device("meta"):
            network = EncodedNetwork(
                nn.Identity(),
                topology,
                blocks[f"x_0_{depth}"].conv1[0].out_channels,
                head[0].out_channels,
                norm=same(self, [norm_option(self, layer[1]) for layer in layers], "norm"),
                act=same(self, [act_option(self, layer[2]) for layer in layers], "activation"),
                upsample=same(self, [self._upsample(block) for block in blocks.values()], "up-sampling"),
                bias=layers[0][0].bias is not None,
                attention=self._attention(blocks.values()),
                form=self._form(head),
            )
        state = {
            name: value
            for name, value in module.state_dict().items()
            if not name.startswith(("encoder.", "decoder.center."))
        }
        fill(self, network, self.pairs(network), state, {})
        network.encoder = copy.deepcopy(module.encoder)
        center = getattr(decoder, "center", None)
        network.unused = copy.deepcopy(center) if center is not None and center.state_dict() else None
        return network

    def _topology(self, blocks: Mapping[str, nn.Module], depth: int, encoder: list[int], in_channels: int) -> Topology:
        width = dict.fromkeys(nest(depth), 0)
        for i, j in width:
            block = blocks.get(_block_name(i, j, depth)) if j else None
            width[i, j] = block.conv1[0].out_channels if block else 0 if j else encoder[i]
        nodes = [Node(i, j, width[i, j], tuple(range(j)), width[i + 1, j - 1] if j else 0) for i, j in nest(depth)]
        topology = Topology(in_channels, blocks["x_0_0"].conv1[0].weight.ndim - 2, tuple(nodes), (depth,))
        return topology if encoder[0] else topology.without_finest_map()

    def _upsample(self, block: nn.Module) -> Option:
        mode = getattr(block, "interpolation_mode", "nearest")
        if mode in ("nearest", "bilinear", "trilinear"):
            return "nearest" if mode == "nearest" else "linear"
        raise self.fail(f"its decoder interpolates by {mode!r}; unetpp_fast has nearest and linear")

    def _attention(self, blocks: Iterable[nn.Module]) -> bool:
        gates = [gate.attention for block in blocks for gate in (block.attention1, block.attention2)]
        kind = same(self, [type(gate).__name__ for gate in gates], "attention")
        if kind not in ("Identity", "SCSEModule"):
            raise self.fail(f"its attention is {kind}; unetpp_fast has scse")
        return kind == "SCSEModule"

    def _form(self, head: nn.Sequential) -> str:
        conv, upsampling, activation = head
        final = getattr(activation, "activation", activation)
        if any(taps != 3 for taps in conv.kernel_size):
            raise self.fail(f"its head has a {conv.kernel_size} kernel, expected 3x3")
        if not isinstance(upsampling, nn.Identity):
            raise self.fail("its head enlarges the map")
        if type(final) not in FINALS or getattr(final, "dim", 1) != 1:
            raise self.fail(f"its activation is {final}; unetpp_fast has none, sigmoid and softmax over the classes")
        return FINALS[type(final)]

    def pairs(self, network: Any) -> Iterator[Pair]:
        topology = network.topology
        if len(topology.heads) > 1:
            raise ValueError(f"this model cannot be written as a {self.title}, which has one head: prune(level) it first")
        nodes = {f"nodes.{node.name}": node for node in topology.nodes}
        for ours in network.state_dict():
            place = re.match(r"encoder\.|unused\.|(heads|lasts|nodes)\.\w+\.", ours)[0].rstrip(".")
            rest = ours[len(place) + 1 :]
            part = place.partition(".")[0]
            if part in KEPT:
                yield Pair(ours, f"{KEPT[part]}.{_in_encoder(network.encoder, rest) if part == 'encoder' else rest}")
                continue
            node = nodes.get(place)
            block = _block_name(node.level, node.column, topology.depth) if node else f"x_0_{topology.depth}"
            part, inner, *_ = rest.split(".")
            order, dim = self._order(topology, node, part, inner, ours)
            yield Pair(ours, f"decoder.blocks.{block}.{_their_layer(rest)}", None, order, dim)

    def _order(self, topology: Topology, node: Node | None, part: str, inner: str, name: str) -> tuple[Tensor | None, int]:
        """The order of the channels of one tensor, None if it is ours, and their axis."""
        if (
            node is None
            or part not in ("conv1", "attention1")
            or name.endswith(("conv1.bias", "squeeze.bias", "pixel.bias"))
        ):
            return None, 1
        return input_order(topology, node, self.order), 0 if inner == "excite" else 1


def _in_encoder(encoder: nn.Module, ours: str) -> str:
    """smp's name within its encoder; timm's encoders are those that smp calls "tu-" and their name."""
    if not isinstance(encoder, Encoder):
        return ours
    inner = ours.removeprefix("body.")
    return inner if encoder.name is None else f"model.{inner}"


def _block_name(level: int, column: int, depth: int) -> str:
    """The name of the decoder's block at X(level,column)."""
    last = depth - 1 - level
    return f"x_{last - column + 1}_{last}"


def _their_layer(ours: str) -> str:
    """smp's name within a block of `conv1.weight`, `norm2.running_var` or `attention1.excite.bias`."""
    part, _, rest = ours.partition(".")
    if part.startswith("attention"):
        gate, _, leaf = rest.partition(".")
        return f"{part}.attention.{GATES[gate]}.{leaf}"
    return f"conv{part[-1]}.{0 if part.startswith('conv') else 1}.{rest}"
