"""Builds the emulation of `csrc/` with the sanitizers and runs the ops of `torch.ops.unetpp_fast_cuda` on it, on the CPU."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from unetpp_fast.kernels.maps import affine_stride, pixel_stride

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
COMPILER = shutil.which("g++")
FLAGS = ["-std=c++20", "-DUNETPP_EMULATE", "-Wall", "-Wextra", "-Werror"]
# Variables without a value hold a pattern, by which the emulation knows them.
SANITIZED = [
    "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-ftrivial-auto-var-init=pattern",
]  # fmt: skip
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32)
FAULTS = re.search(r"enum class Fault \{(.*?)\}", (SOURCES / "hardware.h").read_text())[1].replace(" ", "").split(",")
# As the library declares the ops; adjacent string literals are one.
SCHEMAS = [
    re.sub(r'"\s*"', "", found)
    for found in re.findall(r'def\(\s*"((?:[^"]|"\s*")*)"\)', (SOURCES / "bindings.cpp").read_text())
]


def build() -> Path:
    """The server, built again when a source has changed; kept in `build/`, which git ignores."""
    files = sorted(path for path in SOURCES.rglob("*") if path.suffix in (".h", ".cu", ".cpp"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files) + " ".join(SANITIZED).encode()).hexdigest()[:16]
    folder = ROOT / "build" / "emulation"
    server = folder / f"server-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run in parallel
        if not server.exists():
            for old in folder.glob("server-*"):
                old.unlink()
            _compile(folder, server)
    return server


def _compile(folder: Path, server: Path) -> None:
    def compiled(source: Path) -> Path:
        # Products run millions of times and touch only the emulation's own memory.
        flags = ["-O3"] if source.name == "warp.cpp" else SANITIZED
        target = folder / f"{source.stem}.o"
        _run(COMPILER, *FLAGS, *flags, "-x", "c++", "-c", source, "-o", target)
        return target

    sources = [*SOURCES.glob("*.cu"), *(SOURCES / "emulation").glob("*.cpp")]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(sources, key=lambda path: path.stem in ("kernels", "fibers"))))
    _run(COMPILER, *SANITIZED, *objects, "-o", folder / "new")
    os.replace(folder / "new", server)


def _run(*command) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]


class Emulation:
    """The ops, with threads in the given `order` and with the given `fault`.

    After a call, `shared` is the shared memory of its blocks, and `conflicts` the most rows of a matrix that ldmatrix read
    from the same banks.
    """

    def __init__(self) -> None:
        self.server = build()
        self.process: subprocess.Popen | None = None
        self.order, self.fault, self.shared, self.conflicts = 0, "none", 0, 0

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()
            self.process.stderr.close()
            self.process = None

    def _ask(self, numbers: list[int], storages: list[Tensor]) -> None:
        """Runs a request and copies back the storages that the kernel has written."""
        if self.process is None:
            environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
            pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
            self.process = subprocess.Popen([self.server], **pipes, env=environment)
        try:
            self.process.stdin.write(struct.pack(f"<{len(numbers) + 1}q", len(numbers), *numbers))
            for storage in storages:
                self.process.stdin.write(storage.numpy().tobytes())
            self.process.stdin.flush()
            self.shared, self.conflicts, length = struct.unpack("<3q", self._receive(24))
            error = self._receive(length).decode()
            results = [self._receive(storage.numel()) for storage in storages]
        except (EOFError, BrokenPipeError):
            report = self.process.stderr.read().decode()
            self.process.wait()
            self.process = None
            raise RuntimeError(f"the emulation stopped:\n{report[:6000]}") from None
        if error:
            raise RuntimeError(error)
        for storage, result in zip(storages, results, strict=True):
            if result:
                storage.copy_(torch.frombuffer(bytearray(result), dtype=torch.uint8))

    def _receive(self, count: int) -> bytes:
        data = self.process.stdout.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def run(self, op: int, config: int, like: Tensor, describe: Callable[[_Call], list[int]]) -> None:
        """`describe(call)` returns the op's numbers; `call.pointer(x)` those of a tensor, whose storage is sent once."""
        call = _Call()
        body = describe(call)
        head = [op, PRECISIONS.index(like.dtype), config, self.order, FAULTS.index(self.fault), len(call.storages)]
        self._ask([*head, *(storage.numel() for storage in call.storages), *body], call.storages)

    def conv(
        self,
        out,
        a,
        wa,
        scale_a,
        shift_a,
        b,
        wb,
        scale_b,
        shift_b,
        bias,
        border,
        stats,
        axes,
        phased,
        slope,
        act,
        add,
        config,
    ) -> None:
        """As `torch.ops.unetpp_fast_cuda.conv`."""

        def describe(call: _Call) -> list[int]:
            return [
                *call.map(a, scale_a, shift_a), *call.map(b, scale_b, shift_b),
                *(number for x in (wa, wb, bias, border, stats, out) for number in call.pointer(x)),
                out.stride(0), pixel_stride("out", out), *out.shape, int(axes == 3), int(phased), int(act), int(add),
                _bits(slope),
            ]  # fmt: skip

        self.run(0, config, out, describe)

    def conv_wgrad(self, a, scale, shift, dy, partial, result, axes, phased, slope) -> None:
        """As `torch.ops.unetpp_fast_cuda.conv_wgrad`."""

        def describe(call: _Call) -> list[int]:
            maps = [*call.map(a, scale, shift), *call.map(dy, None, None), *call.pointer(partial), *call.pointer(result)]
            return [*maps, a.shape[0], partial.shape[0], int(axes == 3), int(phased), _bits(slope)]

        self.run(1, 0, a, describe)


class _Call:
    def __init__(self) -> None:
        self.storages: list[Tensor] = []
        self.places: dict[int, int] = {}

    def pointer(self, x: Tensor | None) -> list[int]:
        """The number of a tensor's storage and its offset there, in bytes."""
        if x is None:
            return [-1, 0]
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.places:
            self.places[storage.data_ptr()] = len(self.storages)
            self.storages.append(torch.empty(0, dtype=torch.uint8).set_(storage))
        return [self.places[storage.data_ptr()], x.storage_offset() * x.element_size()]

    def map(self, x: Tensor | None, scale: Tensor | None, shift: Tensor | None) -> list[int]:
        if x is None:
            return [-1, 0, 0, 0, 0, 0, 0, 0, -1, 0, -1, 0, 0]
        affine = None if scale is None else (scale, shift)
        sizes = [x.stride(0), pixel_stride("x", x), *x.shape[1:]]
        return [*self.pointer(x), *sizes, *self.pointer(scale), *self.pointer(shift), affine_stride(affine)]


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


@contextlib.contextmanager
def emulated() -> Iterator[Emulation]:
    """Inside, `torch.ops.unetpp_fast_cuda` runs in the emulation for tensors on the CPU, and TF32 is allowed."""
    allowed, torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.conv.fp32_precision, "tf32"
    emulation, library = Emulation(), torch.library.Library("unetpp_fast_cuda", "FRAGMENT")
    try:
        for schema in SCHEMAS:
            name = schema.split("(")[0]
            if not hasattr(torch.ops.unetpp_fast_cuda, name):
                library.define(schema)
            library.impl(name, getattr(emulation, name), "CPU")
        yield emulation
    finally:
        library._destroy()
        emulation.close()
        torch.backends.cudnn.conv.fp32_precision = allowed
