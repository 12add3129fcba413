"""The reference path through torch.compile, torch.export and ONNX, as one graph."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import (
    COMPILED,
    FLOAT32,
    assert_close_relative,
    assert_gradients_close,
    build,
    gradients,
    make_input,
    weighted_sum,
)
from torch import Tensor, nn
from torch.export import Dim

import unetpp_fast as uf

# torch's own exporters and compilers warn about parts of torch.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*LeafSpec:FutureWarning")

UPSAMPLES = ["deconv", "nearest", ("linear", {"align_corners": True})]


def deep_model(spatial_dims: int = 2, **options: Any) -> uf.UNetPlusPlus:
    return build(uf.UNetPlusPlus, 2, 3, spatial_dims=spatial_dims, features=(3, 4, 5), deep_supervision=True, **options)


def run_and_differentiate(model: nn.Module, parameters_of: nn.Module, x: Tensor) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Outputs, gradient of the input and gradients of the parameters."""
    parameters_of.zero_grad()
    leaf = x.clone().requires_grad_()
    outputs = model(leaf)
    weighted_sum(outputs).backward()
    return outputs, leaf.grad, gradients(parameters_of)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["unet++", "unet"])
def test_compile_fullgraph(name: str, backend: str) -> None:
    """Outputs and gradients in training, without a graph break."""
    if backend == "inductor":
        if not shutil.which(os.environ.get("CXX", "g++")):
            pytest.skip("inductor needs a C++ compiler: g++, or another named in CXX")
        if not Path(sysconfig.get_path("include"), "Python.h").exists():
            pytest.skip("inductor needs Python's headers")
    if name == "unet++":
        model = build(uf.UNetPlusPlus, 2, 1, features=(3, 4, 5), norm="batch", deep_supervision=True)
    else:
        model = build(uf.UNet, 2, 1, features=(3, 4), norm="instance", upsample="linear")
    x = make_input(2, 2, 8, 12)
    expected, x_gradient, parameter_gradients = run_and_differentiate(model, model, x)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    outputs, x_compiled, parameters_compiled = run_and_differentiate(compiled, model, x)
    assert_close_relative(outputs, expected, COMPILED)
    assert_close_relative(x_compiled, x_gradient, COMPILED)
    assert_gradients_close(parameters_compiled, parameter_gradients, COMPILED)


@pytest.mark.parametrize(
    "spatial_dims, norm, upsample",
    [(2, None, UPSAMPLES[0]), (2, "batch", UPSAMPLES[1]), (2, "instance", UPSAMPLES[2]), (3, "batch", UPSAMPLES[0])],
    ids=str,
)
def test_export_with_free_batch_and_sizes(spatial_dims: int, norm: str | None, upsample: Any) -> None:
    """Exported once with every axis free, it runs at other sizes and returns both heads."""
    model = deep_model(spatial_dims, norm=norm, upsample=upsample).eval()
    free = {0: Dim("batch", max=64)} | {2 + k: 4 * Dim(f"axis{k}", max=64) for k in range(spatial_dims)}
    program = torch.export.export(model, (make_input(3, 2, *(12, 16, 8)[:spatial_dims]),), dynamic_shapes=({**free},))
    for batch, size in ((5, (32, 8, 12)), (2, (20, 44, 16)), (3, (12, 16, 8))):
        x = make_input(batch, 2, *size[:spatial_dims], seed=batch)
        assert_close_relative(program.module()(x), model(x), FLOAT32)


def test_export_of_one_size() -> None:
    model = build(uf.UNet, 1, 1, features=(3, 4, 5)).eval()
    x = make_input(1, 1, 8, 8)
    assert_close_relative(torch.export.export(model, (x,)).module()(x), model(x), FLOAT32)


@pytest.mark.parametrize(
    "spatial_dims, level, norm, upsample",
    [(2, 1, "batch", UPSAMPLES[0]), (2, 2, "batch", UPSAMPLES[2]), (2, 2, "instance", UPSAMPLES[1]), (3, 1, None, "deconv")],
    ids=str,
)
def test_onnx_of_a_pruned_network(spatial_dims: int, level: int, norm: str | None, upsample: Any, tmp_path: Path) -> None:
    """ONNX Runtime returns the head's logits, and the file holds only the weights of the kept nodes."""
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    onnx = pytest.importorskip("onnx", reason="reads the exported file")
    runtime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    model = deep_model(spatial_dims, norm=norm, upsample=upsample).eval()
    small = model.prune(level)
    x = make_input(2, 2, *(16, 24, 8)[:spatial_dims])
    path = tmp_path / "pruned.onnx"
    torch.onnx.export(small, (x,), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close_relative(torch.from_numpy(output), small(x), COMPILED)
    assert_close_relative(torch.from_numpy(output), model(x)[level - 1], COMPILED)
    kinds = [node.op_type for node in onnx.load(str(path)).graph.node]
    nodes = (level + 1) * (level + 2) // 2
    assert kinds.count("Conv") == 2 * nodes + 1
    assert kinds.count("MaxPool") == level
    assert kinds.count("ConvTranspose" if upsample == "deconv" else "Resize") == nodes - level - 1


def test_onnx_with_free_sizes_and_all_heads(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="torch.onnx needs onnxscript")
    runtime = pytest.importorskip("onnxruntime", reason="runs the exported file")
    model = deep_model().eval()
    path = tmp_path / "whole.onnx"
    free = {0: Dim("batch", max=64), 2: 4 * Dim("h", max=64), 3: 4 * Dim("w", max=64)}
    torch.onnx.export(model, (make_input(3, 2, 12, 16),), path, dynamo=True, dynamic_shapes=(free,), verbose=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = make_input(2, 2, 20, 8)
    outputs = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_close_relative([torch.from_numpy(output) for output in outputs], model(x), COMPILED)
