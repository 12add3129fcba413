"""What `torch.ops.unetpp_fast_cuda` refuses when it is called directly, and the device that is current afterwards.

The checks are compiled for tensors on any device, over kernels that do nothing: without a GPU there are no CUDA tensors. For
the same reason a tensor on another device is a meta tensor here, and the CUDA runtime is a stand-in; `test_cuda_on_gpu.py`
calls the real library.
"""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from support.emulation import COMPILER, SOURCES
from support.emulation_cases import PRECISIONS, conv_case, wgrad_case

from unetpp_fast.kernels import cuda_ops

pytestmark = pytest.mark.skipif(COMPILER is None, reason="the bindings need g++")
CHECKS = """
#include <cstdint>
extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 0; }
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#define unetpp_fast_cuda unetpp_fast_cuda_checks
#define CUDA CompositeExplicitAutograd
#include "bindings.cpp"
const char* run_conv(int, int, const ConvArguments&, Stream) { return nullptr; }
const char* run_wgrad(int, const WgradArguments&, Stream) { return nullptr; }
"""
RUNTIME = """
#pragma once
enum cudaError_t { cudaSuccess, cudaErrorInvalidDevice };
inline int current = 0;
inline cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) {
  if (device > 1) return cudaErrorInvalidDevice;
  return current = device, cudaSuccess;
}
"""
GUARDS = """
#include "device_guard.h"
int main() {
  for (int device = 0; device < 2; device++) {
    const DeviceGuard guard(device);
    if (guard.error() != cudaSuccess || current != device) return 1;
  }
  if (current != 0) return 2;
  const DeviceGuard missing(7);
  return missing.error() == cudaErrorInvalidDevice && current == 0 ? 0 : 3;
}
"""
NODE = {"phased": True, "kb": 24, "affine": "1 n", "bias": True, "border": True}


@pytest.fixture(scope="module")
def ops(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("bindings")
    (folder / "checks.cpp").write_text(CHECKS)
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    paths = [f"-isystem{include}", f"-I{SOURCES}", f"-L{include.parent / 'lib'}"]
    library = folder / "checks.so"
    _compile(*flags, *paths, folder / "checks.cpp", "-o", library, "-ltorch", "-ltorch_cpu")
    torch.ops.load_library(library)
    return torch.ops.unetpp_fast_cuda_checks


def _compile(*options) -> None:
    done = subprocess.run([str(part) for part in (COMPILER, *options)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


def conv_arguments(dtype: torch.dtype = torch.float16, config: int = 0, size: tuple[int, ...] = (18, 34), **case) -> dict:
    """A call by names, with statistics."""
    chosen = cuda_ops.CONFIGS[config]
    out, a, wa, options = conv_case(dtype, size, co=24, **({"taps": 4} if chosen.gathered else NODE), **case)
    tiles = out.shape[1] * math.ceil(size[-2] / chosen.rows) * math.ceil(size[-1] / chosen.columns)
    found = {"out": out, "a": a, "wa": wa, "b": options.get("b"), "wb": options.get("wb")}
    for name in "ab":
        found[f"scale_{name}"], found[f"shift_{name}"] = options.get(f"affine_{name}", (None, None))
    found |= {name: options.get(name) for name in ("bias", "border")}
    found["stats"] = torch.empty(out.shape[0], tiles, 3, 24)
    phased = options["phased"] and "b" in options
    return found | {"axes": len(size), "phased": phased, "slope": 0.0, "act": False, "add": False, "config": config}


def wgrad_arguments(phased: bool = False, size: tuple[int, ...] = (6, 10), parts: int = 4) -> dict:
    a, dy, options = wgrad_case(torch.float16, size, k=5, co=3, phased=phased, rows=2)
    scale, shift = options["affine"]
    shape = (4 if phased else 3) ** len(size), 5, 3
    partial, result = torch.empty(parts, *shape), torch.empty(shape)
    found = {"a": a, "scale": scale, "shift": shift, "dy": dy, "partial": partial, "result": result}
    return found | {"axes": len(size), "phased": phased, "slope": 0.0}


@pytest.mark.parametrize("size", [(18, 34), (2, 4, 6)])
def test_right_calls_pass(ops, size):
    """For every configuration, with the statistics that the ops of `cuda_ops` allocate."""
    for config in range(len(cuda_ops.CONFIGS)):
        for dtype in PRECISIONS:
            ops.conv(**conv_arguments(dtype, config, size))
        arguments = conv_arguments(config=config, size=size)
        for stats in (arguments["stats"][:, 1:], torch.cat([arguments["stats"]] * 2, 1)):
            with pytest.raises(RuntimeError, match="stats must be contiguous with"):
                ops.conv(**arguments | {"stats": stats.contiguous()})
    for phased in (False, True):
        ops.conv_wgrad(**wgrad_arguments(phased, size))


CONV = [
    ("out", lambda x: x.double(), "out must be float16, bfloat16 or float32"),
    ("out", lambda x: x[:0], "out must be .*not empty"),
    ("out", lambda x: x[0], "out must be .N, D, H, W, C."),
    ("out", lambda x: x[:, :, :17], "a is 1x18x34 where 1x17x34 is needed"),
    ("a", lambda x: x.to("meta"), "a must be on the device of the other arguments"),
    ("a", lambda x: x.float(), "a must be of the type of the other maps"),
    ("a", lambda x: x[:1], "a has 1 images, not 2"),
    ("a", lambda x: x[:, :, :17], "a is 1x17x34 where 1x18x34 is needed"),
    ("a", lambda x: x.transpose(3, 4).contiguous().transpose(3, 4), "a must be channels-last"),
    ("a", lambda x: torch.cat([x, x], 3)[:, :, :, :34], "the pixels of a are not evenly spaced"),
    ("wa", lambda x: x[:8], "wa must be contiguous with 8640 values"),
    ("wa", lambda x: x.float(), "wa must be of the type"),
    ("wa", lambda x: x.to("meta"), "wa must be on the device"),
    ("scale_a", lambda x: None, "scale and shift of a come together"),
    ("scale_a", lambda x: x[:, :3], "scale and shift of a must be"),
    ("shift_b", lambda x: x[:1], "scale and shift of b differ"),
    ("shift_b", lambda x: x.half(), "scale and shift must be float32"),
    ("shift_b", lambda x: x.to("meta"), "scale and shift must be on the device"),
    ("b", lambda x: x[:, :, 1:], "b is 1x8x17 where 1x9x17 is needed"),
    ("b", lambda x: None, "b and wb come together"),
    ("wb", lambda x: x[:3], "wb must be contiguous"),
    ("phased", lambda x: False, "b is 1x9x17 where 1x18x34 is needed"),
    ("bias", lambda x: x[1:], "bias must be contiguous with 24 values"),
    ("bias", lambda x: x.half(), "bias must be float32"),
    ("bias", lambda x: x.to("meta"), "bias must be on the device"),
    ("border", lambda x: x[1:], "border must be contiguous with 216 values"),
    ("stats", lambda x: x.double(), "stats must be float32"),
    ("axes", lambda x: 1, "axes is 2 or 3"),
    ("config", lambda x: 8, "config is 0 to 7"),
    ("config", lambda x: -1, "config is 0 to 7"),
    ("config", lambda x: 4, "a is 1x18x34 where 1x36x68 is needed"),
]
WGRAD = [
    ("a", lambda x: x.double(), "a must be float16"),
    ("a", lambda x: x.transpose(1, 2), "a map of two axes has depth 1"),
    ("dy", lambda x: x.to("meta"), "dy must be on the device"),
    ("dy", lambda x: x.bfloat16(), "dy must be of the type"),
    ("dy", lambda x: x[:, :, 1:], "dy is 1x5x10 where 1x6x10 is needed"),
    ("dy", lambda x: x[1:], "dy has 1 images, not 2"),
    ("phased", lambda x: True, "dy is 1x6x10 where 1x12x20 is needed"),
    ("partial", lambda x: x[:0], "partial must be"),
    ("partial", lambda x: x[:, 1:].contiguous(), "partial must be contiguous with 540 values"),
    ("result", lambda x: x[1:], "result must be contiguous with 135 values"),
    ("result", lambda x: x.half(), "result must be float32"),
    ("result", lambda x: x.to("meta"), "result must be on the device"),
]


@pytest.mark.parametrize(("name", "change", "message"), CONV)
def test_wrong_calls_of_conv_are_named(ops, name, change, message):
    arguments = conv_arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.conv(**arguments | {name: change(arguments[name])})


def test_a_data_gradient_has_one_operand(ops):
    arguments = conv_arguments(config=4)
    with pytest.raises(RuntimeError, match="b has no place in a data gradient"):
        ops.conv(**arguments | {"b": arguments["out"], "wb": arguments["wa"]})
    with pytest.raises(RuntimeError, match="phased needs b"):
        ops.conv(**arguments | {"phased": True})


@pytest.mark.parametrize(("name", "change", "message"), WGRAD)
def test_wrong_calls_of_conv_wgrad_are_named(ops, name, change, message):
    arguments = wgrad_arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.conv_wgrad(**arguments | {name: change(arguments[name])})


def test_a_launch_leaves_the_current_device_as_it_was(tmp_path: Path):
    (tmp_path / "cuda_runtime_api.h").write_text(RUNTIME)
    (tmp_path / "guards.cpp").write_text(GUARDS)
    _compile("-std=c++20", f"-I{tmp_path}", f"-I{SOURCES}", tmp_path / "guards.cpp", "-o", tmp_path / "guards")
    assert subprocess.run([tmp_path / "guards"]).returncode == 0
    assert "DeviceGuard guard(stream.device)" in (SOURCES / "hardware.h").read_text()
