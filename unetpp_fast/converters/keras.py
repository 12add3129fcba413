"""The paper's own Keras code (`helper_functions.py`): U-Net, wide U-Net and UNet++, 2D.

Weights are arrays by layer and weight (`conv11_1/kernel:0`), or an HDF5 file of `save_weights` or `save` from Keras 2.
Nodes read the up-sampled map first; kernels are [height, width, in, out], those of transposed convolutions
[height, width, out, in]. Outputs are probabilities, as in Keras, but with the channels first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..architecture.topology import Node, Topology
from ..common.errors import InputError
from ..common.extras import need
from ..models.network import Network
from .peer import Peer, State, build, check_widths, nest, read_topology

DEPTH = 4
LAYER = r"(conv\d\d_[12]|up\d\d|output(_[1-4])?)/(kernel|bias)"


class Keras(Peer):
    name = "keras"
    title = "Keras network of the paper"
    keys = LAYER
    order = "up, prefix"
    open_options = ("dropout",)
    file_kind = "an HDF5 file of Keras"
    file_endings = (".h5", ".hdf5")

    def module(self, node: Node, part: str) -> str | None:
        place = f"{node.level + 1}{node.column + 1}"
        return f"up{place}" if part == "up" else f"conv{place}_{part[-1]}"

    def head(self, column: int, topology: Topology) -> str:
        return f"output_{column}" if len(topology[0, topology.depth].prefix) > 1 else "output"

    def leaf(self, name: str) -> str:
        return {"weight": "/kernel:0", "bias": "/bias:0"}[name]

    def axes(self, part: str, leaf: str, ndim: int) -> tuple[int, ...] | None:
        return (3, 2, 0, 1) if leaf == "weight" else None

    def read(self, state: State, given: Mapping[str, Any]) -> Network:
        nested = not any(name.startswith("output/") for name in state)
        several = "output_1/kernel:0" in state
        grid = nest(DEPTH) if nested else [(i, 0) for i in range(DEPTH + 1)] + [(DEPTH - j, j) for j in range(1, DEPTH + 1)]
        topology = read_topology(self, state, grid, tuple(range(1, DEPTH + 1)) if several else (DEPTH,), nested)
        check_widths(self, topology, lambda low, width, level: width)
        return build(
            topology,
            self.tensor(state, f"{self.head(DEPTH, topology)}/kernel:0").shape[-1],
            norm=None,
            dropout=given.get("dropout", 0.5),
            deep_supervision=several,
            form="sigmoid",
        )

    def plain_names(self, state: State) -> State:
        """`layer/kernel:0` for every weight of a known layer, whatever scopes Keras put between the two, with or without
        the `:0`."""
        plain = {}
        for name, tensor in state.items():
            layer, _, rest = name.partition("/")
            weight = rest.rpartition("/")[2].removesuffix(":0")
            plain[f"{layer}/{weight}:0" if re.match(LAYER, f"{layer}/{weight}") else name] = tensor
        return plain

    def read_file(self, path: Path) -> State:
        """The weights in an HDF5 file of Keras 2.

        Raises:
            InputError: h5py is missing, or the file does not exist or is not HDF5.
        """
        h5py = need("h5py", "keras")
        arrays: dict[str, Any] = {}
        try:
            with h5py.File(path, "r") as file:
                root = file.get("model_weights", file)
                root.visititems(
                    lambda name, item: arrays.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
                )
        except OSError as error:
            raise InputError(f"{path} cannot be read as HDF5 ({error}): give a file of Keras' save_weights") from error
        return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}

    def written(self, state: dict[str, Tensor]) -> dict[str, np.ndarray]:
        return {name: value.cpu().numpy() for name, value in state.items()}
