"""The CUDA kernels compile for every GPU generation without a GPU: no spill, tensor cores in use, 16-byte copies; and link.
The instructions are run too: every accumulator gets every product once.

Run with `-s` for the table of registers and shared memory of every instance. Those for bfloat16, which differ from float16's
in conversions alone (a test compares them), are compiled for sm_90 only; with UNETPP_FAST_COMPILE_ALL=1 for all. A release
runs this against its wheel ([tool.cibuildwheel]).
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from support import compiled_kernels
from support.csrc import builder, cuobjdump
from support.emulation import SCHEMAS, SOURCES
from support.library_needs import foreign_libraries, foreign_symbols, symbols
from support.sass.check import packed_arguments, wrong
from support.sass.listing import Instruction, decode, functions
from support.sass.products import Conv, Wgrad
from support.sass.thread import Thread

from unetpp_fast.execution.fused import libraries
from unetpp_fast.kernels import cuda_ops

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 90, 100, 120)
RELEASED = os.environ.get("UNETPP_FAST_BUILD") == "cuda"  # and installed, with all instances
ALL = compiled_kernels.ALL or RELEASED
# Shared memory and registers of a block at most.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
REGISTERS = 64 * 1024
PRECISIONS = {"N2hw4HalfE": "float16", "N2hw8BFloat16E": "bfloat16", "f": "tf32"}
BYTES = {"float16": 2, "bfloat16": 2, "tf32": 4}
# Each call has a configuration that fits every GPU; the others are taken where they fit.
LEAST = {min(config.shared for config in cuda_ops.configs(co, gathered)) for co in (32, 64) for gathered in (False, True)}
ONLY_WHERE_IT_FITS = {config.shared for config in cuda_ops.CONFIGS} - LEAST


def instances(architecture: int) -> int:
    """How many kernels there are for a GPU generation: convolutions and weight gradients, and the sum of their parts."""
    return (len(PRECISIONS) if ALL or architecture == 90 else len(PRECISIONS) - 1) * (len(cuda_ops.CONFIGS) + 2) + 1


TOOL = cuobjdump()
pytestmark = [
    pytest.mark.skipif(builder().find_nvcc() is None, reason="the kernels need nvcc"),
    pytest.mark.skipif(TOOL is None, reason="listing instructions needs cuobjdump"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    """The extension for all generations, built again when a source has changed; kept in `build/`, which git ignores. Of a
    release the one that is installed."""
    if RELEASED:
        return libraries.FOLDER / "unetpp_fast_cuda.so"
    files = sorted(path for path in [*SOURCES.iterdir(), Path(__file__)] if path.suffix in (".h", ".cu", ".cpp", ".py"))
    text = b"".join(path.read_bytes() for path in files) + f"{torch.__version__} {ALL}".encode()
    folder = ROOT / "build" / "sass" / hashlib.sha256(text).hexdigest()[:16]
    target = folder / "unetpp_fast_cuda.so"
    if not target.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        names = ";".join(f"{number // 10}.{number % 10}" for number in ARCHITECTURES)
        made = builder()
        with (
            mock.patch.dict(os.environ, {"MAX_JOBS": "2", **os.environ, "TORCH_CUDA_ARCH_LIST": names}),
            mock.patch.object(made, "cuda_commands", _fewer(made.cuda_commands)),
        ):
            made.build("cuda", target, folder / "objects")
    return target


def _fewer(commands):
    """`cuda_commands` that compiles bfloat16's kernels for sm_90 alone, unless ALL."""
    few = "-gencode=arch=compute_80,code=[sm_90]"

    def fewer(library: Path, folder: Path):
        pieces, link = commands(library, folder)
        if ALL:
            return pieces, link
        for source, _, command in pieces:
            if source.name == "bfloat16.cu":
                command[:] = [few if str(part).startswith("-gencode") else part for part in command]
        return pieces, link

    return fewer


def _output(*command, **options) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def instance(name: str) -> tuple[str, int, int]:
    """A kernel's readable name, its threads and its dynamic shared memory, from its mangled name."""
    if "add_parts" in name:
        return "add_parts", 256, 0
    if traits := re.search(r"WgradTraitsI(.+?)Lb([01])E", name):
        phased = traits[2] == "1"
        return f"conv_wgrad {PRECISIONS[traits[1]]}{' phased' * phased}", 256, 48640 if phased else 78336
    kind, co, rows, stages, gathered = re.search(r"ConvTraitsI(.+?)Li(\d+)ELi(\d+)ELi(\d)ELb([01])E", name).groups()
    rows = int(rows) // 2 if gathered == "1" else int(rows)
    config = next(
        config
        for config in cuda_ops.CONFIGS
        if (config.block_co, config.rows, config.stages, config.gathered) == (int(co), rows, int(stages), gathered == "1")
    )
    warps = config.rows // 2 * config.block_co // 32
    what = f"conv {PRECISIONS[kind]} {co} x {rows} rows, {stages} stages{', gathered' * config.gathered}"
    return what, 32 * warps, config.shared


@pytest.fixture(scope="module")
def usage(library: Path) -> dict[tuple[int, str], dict[str, int]]:
    """Registers, stack and local memory of each (architecture, kernel)."""
    rows, architecture = {}, 0
    for line in _output(TOOL, "-res-usage", library).splitlines():
        if match := re.match(r"arch = sm_(\d+)", line.strip()):
            architecture = int(match[1])
        elif match := re.match(r"Function (\S+):", line.strip()):
            name = match[1]
        elif "REG:" in line:
            rows[architecture, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return rows


@pytest.fixture(scope="module")
def sass(library: Path) -> dict[tuple[int, str], list[Instruction]]:
    """The instructions of each (architecture, kernel)."""
    found = functions(_output(TOOL, "-sass", library))
    return {(architecture, name): decode(text) for architecture, name, text in found}


def products_of(name: str) -> Conv | Wgrad | None:
    """What an instance, by its mangled name, has to multiply."""
    if match := re.search(r"WgradTraitsI(.+?)Lb([01])E", name):
        return Wgrad(BYTES[PRECISIONS[match[1]]], match[2] == "1")
    if match := re.search(r"ConvTraitsI(.+?)Li(\d+)ELi(\d+)ELi(\d)ELb([01])E", name):
        return Conv(BYTES[PRECISIONS[match[1]]], *map(int, match.groups()[1:4]), match[5] == "1")
    return None


@pytest.fixture(scope="module")
def arguments(sass, tmp_path_factory) -> dict[Conv | Wgrad, bytes]:
    """What each instance is called with."""
    instances = sorted({found for _, name in sass if (found := products_of(name))}, key=str)
    folder = tmp_path_factory.mktemp("arguments")
    given = [(f"{type(instance).__name__}Arguments", instance.arguments, instance.size) for instance in instances]
    return dict(zip(instances, packed_arguments(given, SOURCES, builder().find_compiler(), folder), strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sass_has_no_spill_and_fits(usage, architecture: int):
    rows = {name: row for (number, name), row in usage.items() if number == architecture}
    assert len(rows) == instances(architecture)
    for name, row in sorted(rows.items(), key=lambda item: instance(item[0])):
        what, threads, shared = instance(name)
        print(f"sm_{architecture:<4} {what:<48} {threads:>4} threads {row['REG']:>4} registers {shared:>7} bytes shared")
        assert row["STACK"] == row["LOCAL"] == 0, f"{what} spills: {row}"
        assert row["REG"] * threads <= REGISTERS
        assert shared <= SHARED_MEMORY[architecture] or shared in ONLY_WHERE_IT_FITS, what


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sass_uses_tensor_cores(sass, architecture: int):
    """Products by HMMA, operands by ldmatrix (except TF32's transposed ones), copies of 16 bytes to shared memory."""
    rows = {instance(name)[0]: code for (number, name), code in sass.items() if number == architecture}
    assert len(rows) == instances(architecture)
    for what, code in rows.items():
        counter = Counter(".".join([instruction.name, *instruction.kinds]) for instruction in code)
        total = {kind: sum(count for name, count in counter.items() if name.startswith(kind)) for kind in ("LDL", "STL")}
        assert not any(total.values()), f"{what} uses local memory"
        if what == "add_parts":
            continue
        products = [name for name in counter if name.startswith("HMMA")]
        assert products and all("F32" in name for name in products), f"{what} multiplies with {products}"
        assert any(name.startswith("LDSM") for name in counter) or "conv_wgrad tf32" in what, f"{what} has no ldmatrix"
        assert any(re.match(r"LDGSTS.*\.128", name) for name in counter), f"{what} has no copies of 16 bytes"
        if what.startswith("conv ") and "tf32" not in what:
            assert any(re.match(r"STG.*\.128", name) for name in counter), f"{what} has no stores of 16 bytes"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sass_multiplies_every_product_once(sass, arguments, architecture: int):
    """Every accumulator meets each tap once, from the right row and column of both tiles; gradients are stored at theirs."""
    rows = {name: code for (number, name), code in sass.items() if number == architecture and products_of(name)}
    assert len(rows) == instances(architecture) - 1
    for name, code in rows.items():
        what, threads, _ = instance(name)
        product = products_of(name)
        for thread in (0, threads - 19):  # the first lane of the first warp, and a lane of the last
            fault = wrong(product, code, architecture, arguments[product], thread)
            assert not fault, f"{what}, thread {thread}: {fault}"


def test_sass_of_float16_and_bfloat16_differs_in_conversions_alone(sass):
    """Two HADD2 convert a pair of float16, a shift and a mask one of bfloat16. Moves and additions of integers are written
    for one unit or another; everything else is there as often, and both are equally long."""
    integers = {"IADD3", "IMAD", "LEA", "LOP3", "MOV", "SHF", "VIADD"}
    halves = {key: code for key, code in sass.items() if "hw4Half" in key[1] and (ALL or key[0] == 90)}
    pairs = [(code, sass[at, name.replace("N2hw4HalfE", "N2hw8BFloat16E")]) for (at, name), code in halves.items()]
    assert len(pairs) == (len(ARCHITECTURES) if ALL else 1) * (len(cuda_ops.CONFIGS) + 2)
    for half, other in pairs:
        counts = [Counter(instruction.name for instruction in code) for code in (half, other)]
        conversions, others = counts[0].pop("HADD2"), counts[1].pop("HADD2", 0)
        assert others == 0 and counts[1]["LOP3"] - counts[0]["LOP3"] == conversions // 2
        assert len(half) == len(other)
        rest = [{name: count for name, count in count.items() if name not in integers} for count in counts]
        assert rest[0] == rest[1]


def test_sass_copies_of_eight_lanes_meet_in_no_bank(sass, arguments):
    for name in {name for number, name in sass if number == 90 and "hw4Half" in name}:
        product = products_of(name)
        copies = [Thread(sass[90, name], 90, arguments[product], thread).run().copies for thread in range(8)]
        assert all(len({place // 16 % 8 for place in together}) == 8 for together in zip(*copies, strict=True)), name


def test_sass_notices_another_row_and_a_lost_product(sass, arguments):
    for name in ("WgradTraitsIN2hw4HalfELb0", "ConvTraitsIN2hw4HalfELi32ELi8ELi2ELb0"):
        (key,) = (key for key in sass if key[0] == 90 and name in key[1])
        code, product = sass[key], products_of(key[1])
        for kind in ("HMMA", "LDSM"):
            at = next(k for k, instruction in enumerate(code) if instruction.name == kind)
            nothing, target = code[at]._replace(name="NOP"), code[at].operands[0]
            moved = code[at]._replace(operands=(target, f"{code[at].operands[-1][:-1]}+0x40]"))
            changed = [*code[:at], nothing if kind == "HMMA" else moved, *code[at + 1 :]]
            assert wrong(product, changed, 90, arguments[product], 0), (name, kind)


def test_sass_links_to_the_stable_abi_alone(library: Path):
    """The library takes nothing but what torch's stable ABI and the system promise; the CUDA runtime is inside."""
    if shutil.which("nm") is None or shutil.which("readelf") is None:
        pytest.skip("listing what a library needs takes nm and readelf")
    assert "aoti_torch_get_current_cuda_stream" in symbols(library)
    assert foreign_symbols(library) == [] and foreign_libraries(library) == []


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_sass_library_registers_its_ops(library: Path, tmp_path: Path):
    """It loads with a stub for the one function that a torch without CUDA lacks, and has the ops that are emulated."""
    source = tmp_path / "lent.c"
    source.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    _output(os.environ.get("CC", "cc"), "-shared", "-fPIC", source, "-o", tmp_path / "lent.so")
    code = f"""
import ctypes, torch
ctypes.CDLL({str(tmp_path / "lent.so")!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(library)!r})
for name in ("conv", "conv_wgrad"):
    print(getattr(torch.ops.unetpp_fast_cuda, name).default._schema)
"""
    schemas = _output(sys.executable, "-c", code).splitlines()
    assert schemas == [f"unetpp_fast_cuda::{schema}" for schema in SCHEMAS]


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_sass_library_is_off_and_says_why(library: Path):
    from unetpp_fast import info

    assert libraries.load("cuda", library.parent) == (False, "this torch has no CUDA")
    assert any(line.startswith("CUDA kernels") and "off: this torch has no CUDA" in line for line in info.lines())
    with pytest.raises(OSError):  # it could not load either
        ctypes.CDLL(str(library), os.RTLD_NOW)
