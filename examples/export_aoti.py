"""Compiles a checkpoint ahead of time to one file that PyTorch loads and runs without this package, from C++ too.

python -m unetpp_fast.examples.export_aoti RUN/best.pt model.pt2           # needs a C++ compiler; minutes for a large model
"""

import sys
from pathlib import Path

import torch
from torch import nn

from unetpp_fast.training.checkpoint import load_model


def export(network: nn.Module, path: Path, level: int | None = None, largest: int = 4096, **options):
    """Compiles the network, pruned to `level` (default: the deepest), for its device and returns the loaded package.

    It maps images `[N, C, *S]` to probabilities `[N, classes, *S]` of the head at that level; every axis of S must be a
    multiple of 2^level and at most `largest`.

    Args:
        options: of Inductor, as in `torch._inductor.config`.
    """
    topology, device = network.topology, next(network.parameters()).device
    small = network.prune(topology.heads[-1] if level is None else level).eval()
    multiple, axes = small.topology.multiple, range(2, 2 + topology.spatial_dims)
    free = {0: torch.export.Dim("batch", max=1024)}
    free |= {axis: multiple * torch.export.Dim(f"size{axis}", max=largest // multiple) for axis in axes}
    sizes = [(axis + 1) * multiple for axis in axes]
    example = torch.rand(2, topology.in_channels, *sizes, device=device)
    wrapped = nn.Sequential(small, nn.Sigmoid()).eval()
    with torch.no_grad():
        program = torch.export.export(wrapped, (example,), dynamic_shapes=({**free},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
        loaded = torch._inductor.aoti_load_package(str(path))
        image = torch.rand(1, topology.in_channels, *sizes[::-1], device=device)
        torch.testing.assert_close(loaded(image), wrapped(image), rtol=1e-3, atol=1e-4)
    return loaded


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    export(load_model(Path(sys.argv[1]))[0], Path(sys.argv[2]))
    print(f"{sys.argv[2]}: load it with torch._inductor.aoti_load_package")
