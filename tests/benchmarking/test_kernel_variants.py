"""How many variants of the Triton kernels passes compile, and as what, without a GPU.

The kernels must not be those of the interpreter, so this file is also a script, which runs in a process of its own.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.triton_versions import VERSIONS, start

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
SIZES = (96, 112, 144, 160, 224, 256, 384, 512)
WIDE = r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.shared\.global [^;]*, 0x10,"
READ_MAPS = ("_conv_kernel", "_conv_wgrad_kernel", "_pool_kernel", "_norm_apply_kernel", "_head_backward_kernel")
DIVISIBLE = [["tt.divisibility", 16]]


def test_sizes_share_kernels_and_additions_are_fused():
    """Eight sizes compiled 87 kernels for inference and 376 for training when each size's alignment counted."""
    for version in VERSIONS:
        process = start(version, __file__, "count", TRITON_DEFAULT_FP_FUSION="0")
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        counts = json.loads(out)
        assert counts["inference"] <= 61 and counts["training"] <= 193
        assert counts["fused"] == [True]


def test_channels_are_still_loaded_by_sixteen_bytes():
    """There are as many such loads as if every argument, sizes too, were known to be a multiple of 16."""
    process = start("installed", __file__, "loads")
    out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    found, most = json.loads(out)
    assert found == most and set(found) == set(READ_MAPS) and min(found.values()) > 0


def test_every_kernel_has_the_decorator():
    found = 0
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel") and node.decorator_list:
                found += 1
                assert re.match(r"kernel\b", ast.unparse(node.decorator_list[0])), f"{path.name}: {node.name}"
    assert found == 19


def record(sizes: tuple[int, ...], training: bool, channels: int = 1):
    """The variants of the paper's network at some sizes."""
    import kernel_variants

    import unetpp_fast as uf

    model = uf.UNetPlusPlus(channels, 1, features=(32, 64, 128, 256, 512), norm="batch", deep_supervision=True)
    with kernel_variants.recorded() as found:
        for size in sizes:
            x = torch.empty(2, channels, size, size, device="meta")
            kernel_variants.run_pass(model, x, torch.bfloat16, "triton", training)
    return list(found)


def count() -> dict:
    found = {name: record(SIZES, name == "training") for name in ("inference", "training")}
    fused = {dict(variant.options)["enable_fp_fusion"] for variants in found.values() for variant in variants}
    return {name: len(variants) for name, variants in found.items()} | {"fused": sorted(fused)}


def loads() -> list[dict[str, int]]:
    """By kernel, for maps of 112 pixels: loads of 16 bytes in its PTX as it is, and with every argument a multiple of 16."""
    import kernel_variants
    import triton

    by_name = {}
    for variant in record((112,), training=True):
        by_name.setdefault(variant.name, []).append(variant)
    found = {}, {}
    for name in READ_MAPS:
        variant = by_name[name][name.startswith("_conv")]  # the first convolution reads one channel
        integers = [place for place, (_, kind) in enumerate(variant.signature) if kind[0] in "*i"]
        aligned = replace(variant, attributes=tuple((place, json.dumps(DIVISIBLE)) for place in integers))
        for one, counts in zip((variant, aligned), found, strict=True):
            compiled = triton.compile(one.source(), target=kernel_variants.TARGET, options=dict(one.options))
            counts[name] = len(re.findall(WIDE, compiled.asm["ptx"]))
    return list(found)


if __name__ == "__main__":
    print(json.dumps({"count": count, "loads": loads}[sys.argv[1]]()))
