"""The kernels of norm.py, pool.py, head.py and read.py compile for every GPU generation without a GPU.

No spills, shared memory that fits; tensor cores in the heads. `pytest -s` prints the figures of each kernel.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
from support.compiled_kernels import ALL, AMD, Launch, assert_all_compile, compile_all, main
from support.triton_versions import VERSIONS

SINGLE = (
    "stats_ptr",
    "moments_ptr",
    "weight_ptr",
    "bias_ptr",
    "mean_ptr",
    "inverse_ptr",
    "scale_ptr",
    "shift_ptr",
    "averages_ptr",
)
SUMS = ("sums_ptr",)
BRANCHES = ("flipped_ptr", "scales_ptr", "FINAL", "FROZEN", "AXES", "ADD", "ACTIVATE", "SUMMANDS", "HALF", "UP")
MAP = {"AFFINE": True, "SLOPE": 0.1}


def variants() -> list[tuple[str, str, dict, dict]]:
    """(module, kernel, its constexprs, types other than the rule's) as launched at full size, the largest first."""
    from unetpp_fast.kernels.maps import Tile

    norm = [
        ("_norm_finalise_kernel", {"FINAL": False, "STEPS": 2, "BLOCK_T": 256, "BLOCK_C": 8}, {"out_ptr": "*fp32"}),
        ("_norm_finalise_kernel", {"FINAL": True, "STEPS": 4, "BLOCK_T": 256, "BLOCK_C": 8}, {"out_ptr": "*fp32"}),
        ("_border_kernel", {"BLOCK_W": 64, "BLOCK_C": 32}, {}),
    ]
    for channels in (512, 32, 1):
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
        for m, p, k in ((8, 16, 512), (1, 64, 32))
    ]
    head = [*few]
    for half_weight in (False, True):
        weight = {"weight_ptr": "map"} if half_weight else {}
        split = {"SUMMANDS": 0 if half_weight else 3}
        blocks = {"BLOCK_P": 32, "BLOCK_M": 64, "BLOCK_K": 64}
        head += [("_head_kernel", {"CLASSES": 64, **MAP, **split, "STEPS": 8, **blocks}, weight)]
        for classes, channels in ((64, 512), (20, 16), (1, 32)):
            sizes = {"HALF": True, "STEPS": 16, "CLASSES": classes, "channels": channels}
            head += [("_head_backward_kernel", {**MAP, "ADD": True, **split, **sizes}, weight)]
    read = []
    for channels in (512, 32, 1):
        blocks = {"SLOPE": 0.1, **dict(zip(("BLOCK_P", "BLOCK_C"), Tile().blocks(512 * 512, channels), strict=True))}
        finish = {"AXES": 2 + (channels == 32), "ACTIVATE": True, "ADD": channels == 1}
        read += [("_read_kernel", {"PLAIN": channels // 3, **blocks}, {})]
        read += [("_finish_kernel", {**finish, **blocks}, {"border_ptr": "*fp32"})]
    groups = (("norm", norm), ("pool", pool), ("head", head), ("read", read), ("weights", weights()))
    return [(m, *entry) for m, entries in groups for entry in entries]


def weights() -> list[tuple[str, dict, dict]]:
    """Those of `kernels/weights.py`; everything but operands is float32 there."""
    from unetpp_fast.kernels.weights import BLOCK, COLUMNS

    wide = dict.fromkeys(("parameters_ptr", "borders_ptr", "scales_ptr", "gradients_ptr", "out_ptr"), "*fp32")
    types, blocks = {**wide, "jobs_ptr": "*i64"}, {"COLUMNS": COLUMNS, "BLOCK": BLOCK}
    forward = {"training": {"scales_ptr": None}, "inference": {"flipped_ptr": None}}
    found = []
    for axes in (2, 3):
        shared = {"AXES": axes, **blocks}
        found += [("_arrange_kernel", {**shared, **given}, types) for given in forward.values()]
        found += [("_arrange_back_kernel", shared, types)]
        for up in ("deconv", "project", "none"):
            found += [("_phases_kernel", {"UP": up, **shared, **given}, types) for given in forward.values()]
            names = ("_phases_weight_kernel", *(["_phases_up_kernel"] if up != "none" else []))
            found += [(name, {"UP": up, **shared}, types) for name in names]
    return found


def launch(module: str, name: str, constants: dict, types: dict, map_type: str, ones: bool = False) -> Launch:
    """A kernel for maps of a type. ones: specialised as for sizes, strides and counts of 1."""
    from triton.compiler import ASTSource

    from unetpp_fast.kernels import head

    kernel = getattr(importlib.import_module(f"unetpp_fast.kernels.{module}"), name)
    constants, signature, warps = dict(constants), {}, 4
    if map_type == "fp32" and "SUMMANDS" in constants:
        constants |= {"SUMMANDS": 0, **({"HALF": False} if "HALF" in constants else {})}
    if "channels" in constants:
        *blocks, warps = head.backward_blocks(constants["CLASSES"], constants.pop("channels"), constants["HALF"])
        constants |= zip(("BLOCK_P", "BLOCK_M", "BLOCK_K"), blocks, strict=True)
    multiplies = "SUMMANDS" in constants or constants.get("UP") in ("deconv", "project")
    shape = " ".join(f"{key}={value}" for key, value in constants.items())
    # What decides which lines of a kernel are compiled; the rest are sizes.
    given = {key: constants[key] for key in BRANCHES if key in constants and not ones}
    branches = [f"no {key}" if value is None else str(value) for key, value in given.items()]
    for parameter in kernel.arg_names:
        kind = types.get(parameter)
        if parameter in constants:
            kind = "constexpr"
        elif parameter.endswith("_ptr"):
            kind = kind or ("fp32" if parameter in (*SINGLE, *SUMS) else "map")
            kind = "*" + kind.removeprefix("*").replace("map", map_type)
        elif parameter in ("eps", "count"):
            kind = "fp32"
        elif ones:
            kind, constants[parameter] = "constexpr", 1
        else:
            kind = "i32"
        signature[parameter] = kind
    assert set(constants) <= set(kernel.arg_names), f"{name} has no {set(constants) - set(kernel.arg_names)}"
    # Pointers, strides and channel counts are multiples of 16 where it matters.
    attributes = {
        (k,): [["tt.divisibility", 16]]
        for k, parameter in enumerate(kernel.params)
        if signature[parameter.name] not in ("constexpr", "fp32") and not parameter.do_not_specialize_on_alignment
    }
    group = " ".join([name, map_type, *branches, *["ones"] * ones])
    source = ASTSource(kernel, signature, constants, attributes)
    return Launch(group, f"{shape} {types}", source, {"num_warps": warps, **kernel.run.keywords}, multiplies)


def launches(capability: int) -> Iterator[Launch]:
    """In bfloat16; once with sizes of 1. In float32 what multiplies, and, unless ALL, one launch of each other kernel."""
    in_float32: set[str] = set()
    for variant in variants():
        if capability == AMD and (variant[2].get("UP") == "project" or ("UP" in variant[2] and variant[2]["AXES"] == 3)):
            continue  # other lines of the same loops
        yield launch(*variant, "bf16")
        if capability == 80:
            yield launch(*variant, "fp16", ones=True)
        if capability == 90 and variant[3].get("weight_ptr") != "map":
            found = launch(*variant, "fp32")
            if ALL or found.multiplies or variant[1] not in in_float32:
                yield found
            in_float32.add(variant[1])


@pytest.mark.parametrize("version", VERSIONS)
def test_compiles_without_spills(version: str):
    fewest = {80: 40, 90: len(variants()), 120: 40} if version == "installed" else {80: 17, 90: 40, 120: 17}
    assert_all_compile(compile_all(version, __file__), fewest)


def test_compiles_for_amd():
    """As for NVIDIA: the heads and composed weights on its matrix cores."""
    rows = compile_all("installed", __file__, (AMD,))
    assert_all_compile(rows, {AMD: 28})
    assert len({row["group"].split()[0] for row in rows}) == 17  # all but the two convolutions


if __name__ == "__main__":
    main(launches)
