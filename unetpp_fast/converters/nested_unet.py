"""The PyTorch `NestedUNet`s: pytorch-nested-unet and bigmb's, which have the same names, and UNET-ZOO's.

Convolutions with bias, batch norm, ReLU; bilinear up-sampling with align_corners=True that keeps the number of channels;
one head `final`, or `final1` to `final4` with deep supervision. UNET-ZOO's outputs are probabilities.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..architecture.options import Option
from ..architecture.topology import Node, Topology
from ..models.network import Network
from .peer import Peer, State, act_option, build, check_widths, nest, norm_option, read_topology, same


class Nested(Peer):
    name = "nested-unet"
    title = "NestedUNet (pytorch-nested-unet, bigmb)"
    keys = r"(conv\d_\d\.(conv|bn)[12]|final[1-4]?)\."
    open_options = ("upsample",)
    form = "plain"

    def module(self, node: Node, part: str) -> str | None:
        return f"conv{node.level}_{node.column}.{part.replace('norm', 'bn')}"

    def head(self, column: int, topology: Topology) -> str:
        return f"final{column}" if len(topology.heads) > 1 else "final"

    def read(self, state: State, given: Mapping[str, Any]) -> Network:
        several = any(name.startswith("final1.") for name in state)
        topology = read_topology(self, state, nest(4), (1, 2, 3, 4) if several else (4,))
        check_widths(self, topology, lambda low, width, level: low)
        return build(
            topology,
            self.tensor(state, f"{self.head(4, topology)}.weight").shape[0],
            norm=given.get("norm", "batch"),
            act=given.get("act", "relu"),
            upsample=given.get("upsample", ("linear", {"align_corners": True})),
            deep_supervision=several,
            form=self.form,
        )

    def inspect(self, module: nn.Module) -> dict[str, Any]:
        layers = list(module.modules())
        acts = [layer for layer in layers if type(layer).__module__ == nn.ReLU.__module__ and type(layer) is not nn.Sigmoid]
        norms = [layer for layer in layers if type(layer).__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d"))]
        ups = [layer for layer in layers if isinstance(layer, nn.Upsample)]
        for pool in layers:
            if "Pool" in type(pool).__name__ and (type(pool) is not nn.MaxPool2d or _first(pool.kernel_size) != 2):
                raise self.fail(f"its pooling is {pool}, expected nn.MaxPool2d(2)")
        if not ups or not acts or not norms:
            raise self.fail("its class has no nn.Upsample, activation or norm layers to read the options from")
        return {
            "norm": same(self, [norm_option(self, norm) for norm in norms], "norm"),
            "act": same(self, [act_option(self, act) for act in acts], "activation"),
            "upsample": same(self, [self._upsample(up) for up in ups], "up-sampling"),
        }

    def _upsample(self, up: nn.Upsample) -> Option:
        if up.mode not in ("bilinear", "nearest") or float(_first(up.scale_factor)) != 2.0:
            raise self.fail(f"its up-sampling is {up}, expected bilinear or nearest by 2")
        return ("linear", {"align_corners": bool(up.align_corners)}) if up.mode == "bilinear" else "nearest"


def _first(value: Any) -> Any:
    return value[0] if isinstance(value, (tuple, list)) else value


class UnetZoo(Nested):
    name = "unet-zoo"
    title = "UNET-ZOO NestedUNet"
    keys = r"(conv\d_\d\.conv\.[0134]|final[1-4]?)\."
    form = "sigmoid"

    def module(self, node: Node, part: str) -> str | None:
        place = {"conv1": 0, "norm1": 1, "conv2": 3, "norm2": 4}[part]
        return f"conv{node.level}_{node.column}.conv.{place}"
