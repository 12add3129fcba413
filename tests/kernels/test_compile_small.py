"""The kernels of norm.py, pool.py and head.py compiled for GPUs that need not be there: no spills; tensor cores in heads.

In processes of their own, because compiling needs kernels that were not imported for the interpreter.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from support.triton_versions import VERSIONS, start

TARGETS = [80, 90, 120]
SINGLE = ("stats_ptr", "weight_ptr", "bias_ptr", "mean_ptr", "inverse_ptr", "scale_ptr", "shift_ptr", "averages_ptr")
SUMS = ("sums_ptr", "weight_sums_ptr", "bias_sums_ptr")
MAP = {"AFFINE": True, "SLOPE": 0.1}


def variants() -> list[tuple[str, str, dict, dict]]:
    """(module, kernel, its constexprs, types other than the rule's) as launched at full size."""
    from unetpp_fast.kernels.maps import Tile

    norm = [
        ("_norm_finalise_kernel", {"FINAL": False, "STEPS": 2, "BLOCK_T": 256, "BLOCK_C": 8}, {"out_ptr": "*fp32"}),
        ("_norm_finalise_kernel", {"FINAL": True, "STEPS": 4, "BLOCK_T": 256, "BLOCK_C": 8}, {"out_ptr": "*fp32"}),
        ("_border_lines_kernel", {"STEPS": 8, "BLOCK_W": 64, "BLOCK_C": 32}, {}),
    ]
    for channels in (1, 32, 512):
        blocks = {"SLOPE": 0.1, **dict(zip(("BLOCK_P", "BLOCK_C"), Tile().blocks(512 * 512, channels), strict=True))}
        norm += [("_norm_sums_kernel", {"FROZEN": False, "STEPS": 16, **blocks}, {}), ("_norm_apply_kernel", blocks, {})]
    norm += [("_norm_sums_kernel", {"FROZEN": True, "STEPS": 16, "SLOPE": 0.0, "BLOCK_P": 64, "BLOCK_C": 32}, {})]
    norm += [("_act_backward_kernel", {"SLOPE": 0.0, "STEPS": 16, "BLOCK_P": 64, "BLOCK_C": 32}, {})]
    pool = []
    for axes, w, c in ((2, 64, 32), (3, 16, 128)):
        pool += [("_pool_kernel", {"AXES": axes, **MAP, "BLOCK_W": w, "BLOCK_C": c}, {})]
        pool += [("_pool_backward_kernel", {"AXES": axes, **MAP, "ADD": axes == 3, "BLOCK_W": w // 2, "BLOCK_C": c}, {})]
    few = [
        ("_head_few_kernel", {"CLASSES": m, **MAP, "BLOCK_P": p, "BLOCK_K": k}, {})
        for m, p, k in ((1, 64, 32), (8, 16, 512))
    ]
    head = [*few]
    for half_weight in (False, True):
        weight = {"weight_ptr": "map"} if half_weight else {}
        split = {"SUMMANDS": 0 if half_weight else 3}
        blocks = {"BLOCK_P": 32, "BLOCK_M": 64, "BLOCK_K": 64}
        head += [("_head_kernel", {"CLASSES": 64, **MAP, **split, "STEPS": 8, **blocks}, weight)]
        for classes, channels in ((1, 32), (20, 16), (64, 512)):
            sizes = {"HALF": True, "STEPS": 16, "CLASSES": classes, "channels": channels}
            head += [("_head_backward_kernel", {**MAP, "ADD": True, **split, **sizes}, weight)]
    read = []
    for channels in (1, 32, 512):
        blocks = {"SLOPE": 0.1, **dict(zip(("BLOCK_P", "BLOCK_C"), Tile().blocks(512 * 512, channels), strict=True))}
        finish = {"AXES": 2 + (channels == 32), "ACTIVATE": True, "ADD": channels == 1}
        read += [("_read_kernel", blocks, {}), ("_finish_kernel", {**finish, **blocks}, {"border_ptr": "*fp32"})]
    groups = (("norm", norm), ("pool", pool), ("head", head), ("read", read))
    return [(m, *entry) for m, entries in groups for entry in entries]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory, as the assembler counted them."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


def compile_one(module: str, name: str, constants: dict, types: dict, map_type: str, target: int, ones: bool) -> str:
    """One line on a compiled kernel; raises where registers spill. `ones`: as specialised where every size is 1."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from unetpp_fast.kernels import head

    kernel = getattr(importlib.import_module(f"unetpp_fast.kernels.{module}"), name)
    constants, types, signature, warps = dict(constants), dict(types), {}, 4
    if map_type == "fp32" and "SUMMANDS" in constants:
        constants |= {"SUMMANDS": 0, **({"HALF": False} if "HALF" in constants else {})}
    if "channels" in constants:
        *blocks, warps = head.backward_blocks(constants["CLASSES"], constants.pop("channels"), constants["HALF"])
        constants |= zip(("BLOCK_P", "BLOCK_M", "BLOCK_K"), blocks, strict=True)
    for parameter in kernel.arg_names:
        kind = types.get(parameter)
        if parameter in constants:
            kind = "constexpr"
        elif parameter.endswith("_ptr"):
            kind = kind or ("fp32" if parameter in (*SINGLE, *SUMS) else "map")
            kind = "*" + kind.removeprefix("*").replace("map", map_type)
        elif parameter == "eps":
            kind = "fp32"
        elif ones:
            kind, constants[parameter] = "constexpr", 1
        else:
            kind = "i32"
        signature[parameter] = kind
    assert set(constants) <= set(kernel.arg_names), f"{name} has no {set(constants) - set(kernel.arg_names)}"
    # Pointers, strides and channel counts are multiples of 16 where it matters.
    attributes = {
        (k,): [["tt.divisibility", 16]] for k, n in enumerate(kernel.arg_names) if signature[n] not in ("constexpr", "fp32")
    }
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": warps})
    used = resources(built.asm["cubin"])
    line = f"{name} {map_type} sm_{target} {constants if not ones else 'ones'}: {used}, {built.metadata.shared} B shared"
    if used["LOCAL"] or used["STACK"]:
        raise AssertionError(f"spills: {line}")
    if "SUMMANDS" in constants and "mma" not in built.asm["ptx"]:
        raise AssertionError(f"no tensor cores: {line}")
    return line


@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_without_spills(version, tmp_path):
    runs = [start(version, __file__, str(target), TRITON_CACHE_DIR=str(tmp_path)) for target in TARGETS]
    for process in runs:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        assert len(out.splitlines()) >= len(variants())


if __name__ == "__main__":
    gpu = int(sys.argv[1])
    for variant in variants():
        print(compile_one(*variant, "bf16", gpu, False))
        if gpu == 80:
            print(compile_one(*variant, "fp16", gpu, True))
        if gpu == 90 and variant[3].get("weight_ptr") != "map":
            print(compile_one(*variant, "fp32", gpu, False))
