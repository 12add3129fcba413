"""Triton kernels compiled for GPUs that need not be there: registers, spills, shared memory, tensor-core instructions.

Compiling needs the interpreter off, which is decided when Triton is imported. So a test file calls `compile_all`, which runs
that file as a script in another process; the script calls `main` with its kernels.

The installed Triton compiles everything for sm_90. For the other GPU generations it compiles the first kernel of each group:
of a convolution's configurations the one that runs without tuning, of the other kernels' block sizes the largest. So does
the oldest Triton for sm_90; for the other generations it compiles one launch of each kernel. For AMD's gfx942 the installed
one compiles the first of each group, of fewer groups. With UNETPP_FAST_COMPILE_ALL=1 both compile everything.
"""

from __future__ import annotations

import gc
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from support.triton_versions import start

RECORDS = Path(__file__).parents[2] / "build" / "compiled"
ALL = os.environ.get("UNETPP_FAST_COMPILE_ALL") == "1"  # every kernel by both Tritons; many more kernels
TARGETS = (80, 90, 120)
AMD = 942  # of gfx942, an MI300
# sm_80 has 163 KiB, but sm_120 runs its kernels too
SHARED_MEMORY = {80: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024, AMD: 64 * 1024}


class Launch(NamedTuple):
    """A kernel as the compiler takes it. `group` names what it does, `shape` the sizes of its blocks."""

    group: str
    shape: str
    source: Any  # triton.compiler.ASTSource
    options: dict[str, int]
    multiplies: bool  # has to use tensor cores


Row = dict[str, Any]  # what the compiler made of a launch: keys of `figures`, capability, group, shape, multiplies


def compile_all(version: str, script: str, targets: tuple[int, ...] = TARGETS) -> list[Row]:
    """The rows of a script that calls `main`, with that Triton; prints them as a table."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(version, script, version, *map(str, targets), TRITON_CACHE_DIR=folder)
        out, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    rows = json.loads(out)
    for row in rows:
        figures = f"{row['registers']:>4} registers {row['spilled']:>4} spilled {row['shared']:>6} B {row['tensor-core']:>4}"
        names = f"{name_of(row['capability']):<7} {row['group']:<50} {row['shape']:<30}"
        print(f"{names} {figures}{'  BROKEN' * bool(faults(row))}")
    return rows


def name_of(capability: int) -> str:
    """As the compiler calls a GPU."""
    return f"gfx{capability}" if capability == AMD else f"sm_{capability}"


def assert_all_compile(rows: list[Row], fewest: dict[int, int]) -> None:
    """No kernel has a fault; each target has so many kernels at least."""
    broken = [f"{name_of(row['capability'])} {row['group']} {row['shape']} {faults(row)}" for row in rows if faults(row)]
    assert not broken, "\n".join(broken)
    for target, least in fewest.items():
        count = sum(row["capability"] == target for row in rows)
        assert count >= least, f"{name_of(target)}: {count} kernels"


def faults(row: Row) -> str:
    """What is wrong with a compiled kernel, "" if nothing is."""
    limit = SHARED_MEMORY[row["capability"]]
    return ", ".join(
        text
        for wrong, text in (
            (row["spilled"] > 0, "spills registers"),
            (row["shared"] > limit, f"needs more than {limit} bytes of shared memory"),
            (row["multiplies"] and row["tensor-core"] == 0, "does not use tensor cores"),
        )
        if wrong
    )


def main(launches: Callable[[int], Iterable[Launch]]) -> None:
    """Compiles the launches with the Triton and for the targets that the command line names; prints the rows as JSON."""
    gc.disable()  # torch and Triton are many objects, and each compilation leaves few
    oldest, targets = sys.argv[1] == "oldest", [int(target) for target in sys.argv[2:]]
    if targets == [AMD]:
        torch.version.hip = "6.4"  # the kernels' modules, imported later, choose by it how float32 is multiplied
    compiler = Compiler(f"{Path(sys.argv[0]).stem}{'-amd' if targets == [AMD] else ''}")
    rows: list[Row] = []
    for capability in targets:
        seen: set[str] = set()
        for launch in launches(capability):
            kind = launch.source.fn.__name__ if oldest and capability != 90 else launch.group
            first = kind not in seen
            seen.add(kind)
            if first or ALL or (not oldest and capability == 90):
                names = {"group": launch.group, "shape": launch.shape, "multiplies": launch.multiplies}
                rows.append({"capability": capability, **names, **compiler.figures(launch, capability)})
    compiler.save()
    print(json.dumps(rows))


class Compiler:
    """Compiles launches. Remembers in `build/` what each came to, until its source, arguments or Triton change."""

    def __init__(self, name: str) -> None:
        import triton

        self.path = RECORDS / f"{name}-{triton.__version__}.json"
        self.known = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.used: dict[str, dict[str, int]] = {}

    def figures(self, launch: Launch, capability: int) -> dict[str, int]:
        """Registers, spilled bytes, shared memory and tensor-core instructions."""
        made = inspect.getsource(for_amd if capability == AMD else for_nvidia)
        text = f"{launch.source.hash()} {capability} {sorted(launch.options.items())} {made}"
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in self.used:
            known = self.known.get(key)
            self.used[key] = known or (for_amd(launch) if capability == AMD else for_nvidia(launch, capability))
        return self.used[key]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(self.used))
        os.replace(new, self.path)


def for_nvidia(launch: Launch, capability: int) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    result = triton.compile(launch.source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    used = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK", "LOCAL")}
    tensor_cores = len(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async)", result.asm["ptx"]))
    return {
        "registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"],
        "shared": result.metadata.shared, "tensor-core": tensor_cores,
    }  # fmt: skip


def for_amd(launch: Launch) -> dict[str, int]:
    import triton
    from triton.backends.compiler import GPUTarget

    result = triton.compile(launch.source, target=GPUTarget("hip", f"gfx{AMD}", 64), options=launch.options)
    text = result.asm["amdgcn"]
    registers, spilled = (int(re.search(rf"\.vgpr_{name}:\s*(\d+)", text)[1]) for name in ("count", "spill_count"))
    return {
        "registers": registers, "spilled": spilled,
        "shared": result.metadata.shared, "tensor-core": len(re.findall(r"\bv_s?mfma", text)),
    }  # fmt: skip
