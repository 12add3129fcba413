"""Exports a checkpoint as an ONNX file for any batch and size, and checks it once with ONNX Runtime.

python -m unetpp_fast.examples.export_onnx RUN/best.pt model.onnx          # needs pip install 'unetpp_fast[onnx]'
"""

import sys
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from unetpp_fast.training.checkpoint import load_model


def export(network: nn.Module, path: Path, level: int | None = None) -> onnxruntime.InferenceSession:
    """Writes the network, pruned to `level` (default: the deepest), as an ONNX file.

    It maps images `[N, C, *S]` to probabilities `[N, classes, *S]` of the head at that level; every axis of S must be a
    multiple of 2^level.
    """
    topology = network.topology
    small = network.prune(topology.heads[-1] if level is None else level).eval()
    multiple, axes = small.topology.multiple, range(2, 2 + topology.spatial_dims)
    free = {0: torch.export.Dim("batch")} | {axis: multiple * torch.export.Dim(f"size{axis}") for axis in axes}
    example = torch.rand(2, topology.in_channels, *[(axis + 1) * multiple for axis in axes])
    wrapped = nn.Sequential(small, nn.Sigmoid()).eval()
    torch.onnx.export(
        wrapped, (example,), path, dynamo=True, dynamic_shapes=(free,), verbose=False,
        input_names=["image"], output_names=["probabilities"],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    image = torch.rand(1, topology.in_channels, *[(6 - axis) * multiple for axis in axes])
    (probabilities,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(probabilities), wrapped(image), rtol=1e-3, atol=1e-4)
    return session


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    export(load_model(Path(sys.argv[1]))[0], Path(sys.argv[2]))
    print(f"{sys.argv[2]}: image -> probabilities")
