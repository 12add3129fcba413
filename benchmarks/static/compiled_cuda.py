"""What a launch of a CUDA convolution asks of a GPU: its instructions, compiled for sm_90 and run for two threads."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import triton
from bounds import CLOCK, MMA_SYNC, MULTIPROCESSORS, SHARED, Work
from support.sass.check import packed_arguments
from support.sass.listing import Instruction, decode, functions
from support.sass.registers import after
from support.sass.thread import Thread
from torch import Tensor

from unetpp_fast.kernels import cuda_ops

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
CHUNK = 32  # channels of a stage, of 16 bits
IMAGE = 1 << 40  # where maps begin; no kernel needs more of its pointers than that they are aligned, or null
TYPE = "IN2hw8BFloat16E"
PHASES = ("load", "transform", "multiply", "finish")


@dataclass(frozen=True)
class Launch:
    """A kernel by a part of its name, its arguments by name, its blocks and the warps of each.

    tiles: how often a block repeats its loop; the arguments say 2, and the counts are extended (weight gradients).
    """

    kernel: str
    arguments: dict[str, int]
    blocks: int
    warps: int
    tiles: int = 0

    @property
    def key(self) -> str:
        """Equal for launches whose blocks issue the same instructions."""
        given = sorted((name, value) for name, value in self.arguments.items() if name != "images")
        return f"{self.kernel} {self.tiles} {given}"


@dataclass(frozen=True)
class Counts:
    """Instructions of a block's warp, by (phase, name with the size of its access)."""

    issued: Counter

    def total(self, phase: str | None = None) -> float:
        return sum(count for (at, _), count in self.issued.items() if phase in (None, at))

    def of(self, name: str) -> float:
        return sum(count for (_, found), count in self.issued.items() if found.split(".")[0] == name)

    def shared_bytes(self) -> float:
        """Through shared memory, 32 lanes each, without bank conflicts."""
        sizes = {(_, name): shared_access(name) for _, name in self.issued}
        return 32 * sum(count * sizes[key] for key, count in self.issued.items())


def shared_access(name: str) -> int:
    """Bytes that a lane moves through shared memory in an instruction such as "LDGSTS.128" or "LDSM.4"."""
    name, _, size = name.partition(".")
    if name == "LDSM":
        return 4 * int(size or 1)
    return int(size or 32) // 8 if name in ("LDS", "STS", "LDGSTS") else 0


def conv(config: cuda_ops.ConvConfig, out: Tensor, a: Tensor, b: Tensor | None, options: dict) -> Launch:
    """The launch of a 2D call of the op `conv` (`launch_conv`)."""
    phased, stats = options.get("phased", False), options.get("stats", False)
    given = _map("a", a, options.get("affine_a"))
    given |= _map("b", b, options.get("affine_b")) if b is not None else {}
    given |= {"weights_a": IMAGE, "weights_b": IMAGE, "phased": int(phased and b is not None), "out": IMAGE}
    given |= {"out_image_stride": out.stride(0), "out_pixel_stride": out.stride(3), "images": out.shape[0]}
    given |= {"height": out.shape[2], "width": out.shape[3], "channels": out.shape[4]}
    given |= {name: IMAGE for name in ("bias", "border") if options.get(name) is not None}
    given |= {"slope": int(options.get("slope", 0.0) != 0)}
    given |= {"stats": IMAGE * stats, "act": int(options.get("act", False)), "add": int(options.get("add", False))}
    tiles_y, tiles_x = -(-out.shape[2] // config.rows), -(-out.shape[3] // config.columns)
    co_blocks, stages_a = -(-out.shape[4] // config.block_co), -(-a.shape[4] // CHUNK)
    stages = stages_a + (0 if b is None else -(-b.shape[4] // CHUNK))
    given |= {"tiles_y": tiles_y, "tiles_x": tiles_x, "co_blocks": co_blocks, "stages_a": stages_a, "stages": stages}
    rows = config.rows * (2 if config.gathered else 1)  # the traits count those that are read
    kernel = f"ConvTraits{TYPE}Li{config.block_co}ELi{rows}ELi{config.stages}ELb{int(config.gathered)}E"
    return Launch(kernel, given, out.shape[0] * tiles_y * tiles_x * co_blocks, config.rows // 2 * config.block_co // 32)


def wgrad(a: Tensor, dy: Tensor, affine: object, partial: Tensor, phased: bool) -> Launch:
    """The launch of a 2D call of the op `conv_wgrad` (`launch_wgrad`), without the sum of its parts."""
    given = _map("a", a, affine) | _map("dy", dy, None)
    given |= {"partial": IMAGE, "result": IMAGE, "images": dy.shape[0], "parts": partial.shape[0]}
    given |= {"phased": int(phased)}
    tiles_y, tiles_x = -(-dy.shape[2] // 8), -(-dy.shape[3] // 32)
    splits, tiles = partial.shape[0] // (1 if phased else 2), tiles_y * tiles_x
    co_blocks = -(-dy.shape[4] // CHUNK)
    given |= {"tiles_x": tiles_x, "tiles": tiles, "tiles_each": 2, "planes": 1}
    given |= {"taps": 16 if phased else 9}
    blocks = splits * -(-a.shape[4] // CHUNK) * co_blocks
    return Launch(f"WgradTraits{TYPE}Lb{int(phased)}E", given, blocks, 8, -(-dy.shape[0] * tiles // splits))


def _map(name: str, x: Tensor, affine: object) -> dict[str, int]:
    given = {"data": IMAGE, "image_stride": x.stride(0), "pixel_stride": x.stride(3), "depth": x.shape[1]}
    given |= {"height": x.shape[2], "width": x.shape[3], "channels": x.shape[4]}
    given |= {"scale": IMAGE, "shift": IMAGE} if affine is not None else {}
    return {f"{name}.{key}": value for key, value in given.items()}


@cache
def builder():
    spec = importlib.util.spec_from_file_location("unetpp_fast_build", SOURCES / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def kernels() -> dict[str, tuple[list[Instruction], int]]:
    """Instructions and registers of each bfloat16 kernel for sm_90, by mangled name; needs nvcc."""
    build = builder()
    if build.find_nvcc() is None:
        raise SystemExit("the static model compiles the CUDA kernels, and found no nvcc")
    text = b"".join(path.read_bytes() for path in sorted(SOURCES.glob("*.h"))) + (SOURCES / "bfloat16.cu").read_bytes()
    target = ROOT / "build" / "static" / f"{hashlib.sha256(text).hexdigest()[:16]}.cubin"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shipped = "-gencode=arch=compute_80,code=sm_90"  # as build.py translates for every GPU
        command = [build.find_nvcc(), *build.NVCC_FLAGS, "-cubin", shipped, SOURCES / "bfloat16.cu", "-o", target]
        subprocess.run(command, check=True, stdout=sys.stderr)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listed, usage = (
        subprocess.run([tool, flag, target], check=True, capture_output=True, text=True).stdout
        for flag in ("-sass", "-res-usage")
    )
    registers = dict(re.findall(r"Function (\S+):\s+REG:(\d+)", usage))
    return {name: (decode(code), int(registers[name])) for _, name, code in functions(f"arch = sm_90\n{listed}")}


class _Counted(Thread):
    """A thread whose products are counted and not followed: sums may begin with values of global memory."""

    def do_hmma(self, kinds, target, *factors) -> None:
        for k in range(4):
            self.set(after(target, k), None)


def counts(launches: list[Launch]) -> dict[str, Counts]:
    """By `Launch.key`: what a warp issues, the mean of a block's first warp and its last."""
    distinct = list({launch.key: launch for launch in launches}.values())
    with tempfile.TemporaryDirectory() as folder:
        given = [_struct(launch, tiles) for launch in distinct for tiles in (2, 3)]
        packed = packed_arguments(given, SOURCES, builder().find_compiler(), Path(folder))
    found = {}
    for launch, (short, long) in zip(distinct, zip(packed[::2], packed[1::2], strict=True), strict=True):
        (code,) = (code for name, (code, _) in kernels().items() if launch.kernel in name)
        first = _issued(code, short, launch.warps)
        if launch.tiles:
            more = _issued(code, long, launch.warps)
            each = {key: more[key] - first[key] for key in more}
            first = Counter({key: first[key] + each[key] * (launch.tiles - 2) for key in more})
        found[launch.key] = Counts(first)
    return found


def _struct(launch: Launch, tiles: int) -> tuple[str, dict[str, int], int]:
    if not launch.tiles:
        return "ConvArguments", launch.arguments, 2
    return "WgradArguments", {**launch.arguments, "tiles_each": tiles}, 2


def _issued(code: list[Instruction], arguments: bytes, warps: int) -> Counter:
    total: Counter = Counter()
    for thread in (0, 32 * (warps - 1)):
        total.update(by_phase(_Counted(code, 90, arguments, thread).run().issued))
    return Counter({key: count / 2 for key, count in total.items()})


def by_phase(issued: list[tuple[Instruction, bool]]) -> Counter:
    """Counts by (phase, name), "off" for what a guard kept from working: it takes an issue slot alone.

    A wait for copies ends the loads, a barrier the transformation, the next barrier the products; what follows the last
    product finishes the block. A kernel of two stages loads the next one among the products.
    """
    last = max((k for k, (instruction, works) in enumerate(issued) if instruction.name == "HMMA" and works), default=0)
    found, phase = Counter(), "load"
    for k, (instruction, works) in enumerate(issued):
        if instruction.name == "DEPBAR":
            phase = "transform"
        elif instruction.name == "BAR":
            phase = "multiply" if phase == "transform" else "load"
        size = next((kind for kind in instruction.kinds[::-1] if kind.isdigit()), "")
        name = f"{instruction.name}.{size}" if size else instruction.name
        found["finish" if k > last else phase, name if works else "off"] += 1
    return found


def work(name: str, launch: Launch, counted: Counts, flops: float, dram: float) -> Work:
    """The launch's demands, all but bytes to DRAM by its instructions; through L2 goes what blocks copy and store."""
    warps = launch.warps
    rate = MMA_SYNC / MULTIPROCESSORS / CLOCK
    copied = sum(count * shared_access(found) for (_, found), count in counted.issued.items() if found[:6] == "LDGSTS")
    stored = sum(
        count * int(found.partition(".")[2] or 32) / 8 for (_, found), count in counted.issued.items() if found[:3] == "STG"
    )
    return Work(
        name, launch.blocks, flops, tensor=counted.of("HMMA") * warps * 4096 / rate, issue=counted.total() * warps / 4,
        shared=counted.shared_bytes() * warps / SHARED, l2=32 * (copied + stored) * warps * launch.blocks, dram=dram,
    )  # fmt: skip
