"""How many instructions the CUDA kernels issue, and the counts kept in `kept.json`, which a test holds them to.

`python benchmarks/static --keep` writes the file, after a change that is meant.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import torch
from compiled_cuda import Launch, builder, conv, counts, wgrad
from torch import Tensor

from unetpp_fast.kernels import cuda_ops

FILE = Path(__file__).parent / "kept.json"
SIZE = 128  # of the maps: several tiles, the first at the border


def launches() -> dict[str, Launch]:
    """Every convolution's configuration with every kind of call, and the weight gradients, by a name."""
    found = {}
    for k, co in ((32, 32), (192, 32), (64, 64)):
        for config in cuda_ops.configs(co, False):
            name = f"conv {k}→{co}, {config.rows} x {config.columns}, {config.stages} stages"
            found[name] = conv(config, _map(co), _map(k), None, {"act": True, "bias": True})
            found[f"{name}, norm, stats"] = conv(config, _map(co), _map(k), None, {"affine_a": True, "stats": True})
            low = {"phased": True, "bias": True, "border": True, "act": True}
            found[f"{name}, low {co}"] = conv(config, _map(co), _map(k), _map(co, SIZE // 2), low)
    for co in (32, 64):
        for config in cuda_ops.configs(co, True):
            name = f"low gradient 32→{co}, {config.rows} x {config.columns}"
            found[name] = conv(config, _map(co, SIZE // 2), _map(32), None, {"add": True})
    for phased in (False, True):
        partial = torch.empty(8, 16 if phased else 9, 32, 32, device="meta")
        name = f"weight gradient 32→32{', phased' * phased}"
        found[name] = wgrad(_map(32, SIZE // 2 if phased else SIZE), _map(32), True, partial, phased)
    return found


def _map(channels: int, size: int = SIZE) -> Tensor:
    return torch.empty(1, 1, size, size, channels, dtype=torch.bfloat16, device="meta")


def issued() -> dict[str, int]:
    """The instructions of a warp by launch: those of a block's first and last warp, averaged."""
    found = launches()
    counted = counts(list(found.values()))
    return {name: round(counted[launch.key].total()) for name, launch in found.items()}


def compiler() -> str:
    """The version of nvcc; counts hold for one."""
    lines = subprocess.run([builder().find_nvcc(), "--version"], check=True, capture_output=True, text=True).stdout
    return lines.splitlines()[-1]


def kept() -> tuple[str, dict[str, int]]:
    """The compiler and the counts of the file."""
    content = json.loads(FILE.read_text())
    return content["compiler"], content["issued"]


def keep() -> None:
    content = {"compiler": compiler(), "issued": issued()}
    FILE.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
