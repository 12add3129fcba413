"""The CPU library: what it says of arguments that do not fit, every instruction set, and a run under the sanitizers."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import cpu_kernels
from support.csrc import builder
from torch import Tensor

from unetpp_fast.execution.fused import libraries
from unetpp_fast.kernels import cpu_ops

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
LANES = {"plain": 4, "avx2": 8, "avx512": 16}
SANITIZERS = ("-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
needs_library = cpu_kernels.needs_library()


def arguments(name: str) -> dict[str, object]:
    """Arguments of an op that fit: two images of 6 x 10 pixels, 5 channels; small maps and a low source of 3 x 5.

    "few": of a convolution that takes its weights as they are.
    """
    ops, lanes = torch.ops.unetpp_fast_cpu, torch.ops.unetpp_fast_cpu.lanes()
    sums = {"head_backward": (2, 4, 3, 6), "act_backward": (2, 4, 5)}

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape)

    large, small, table = (lambda: ones(2, 1, 6, 10, 5)), (lambda: ones(2, 1, 3, 5, 5)), (lambda: ones(2, 5))
    weights = 8 * 2 * lanes  # of one filter and point: inputs rounded up to 4, one block of outputs
    fit: dict[str, object] = {
        "axes": 2, "slope": 0.1, "act": 1, "add": True, "phased": True, "way": 1, "linear": 0, "plain": 1, "taps": 3,
        "stride": 2, "frozen": False, "chunk": 16, "bias": ones(5), "border": ones(9, 5), "weight": ones(3, 5),
        "mean": table(), "inverse": table(), "averages": ones(1, 2, 5), "ua": ones(36 * weights),
        "ub": ones(4 * 25 * weights), "result": ones(4, 4, 5, 5), "scratch": ones(25 * 2 * lanes), "dy": large(),
        "b": small(),
        "out": small() if name == "pool" else large(), "a": small() if name == "conv_wgrad" else large(),
        "g": small() if name == "pool_backward" else large(), "x": large(), "gx": large(),
        **{key: table() for key in ("scale", "shift", "scale_a", "shift_a", "scale_b", "shift_b")},
        "sums": ones(*sums.get(name, (2, 4, 2, 5))),
    }  # fmt: skip
    if name.startswith("head"):
        fit |= {"out": ones(2, 3, 1, 6, 10), "dy": ones(2, 3, 1, 6, 10), "bias": ones(3)}
    if name in ("conv", "few"):
        fit["stats"] = ones(2, ops.conv_parts(fit["out"], 5, 5, True, 1), 3, 5)
    if name == "few":
        fit |= {"ua": ones(1, 1, 1, 3, 3, 5, 5), "ub": ones(4, 1, 1, 2, 2, 5, 5)}
    if name in ("tiles", "wgrad tiles", "pack tiles"):  # in bfloat16, and packed in pairs
        maps = ("out", "a", "b", "dy")
        fit |= {"way": 2, **{key: fit[key].bfloat16() for key in maps if fit[key].dim() == 5}}
        pairs = 32 * 2 * lanes
        fit |= {"ua": ones(9 * pairs).bfloat16(), "ub": ones(16 * pairs).bfloat16()}
        fit["scratch"] = ones(ops.wgrad_scratch(small().bfloat16(), large().bfloat16(), 2, True))
    if name == "tiles":
        fit["stats"] = ones(2, ops.conv_parts(fit["out"], 5, 5, True, 2), 3, 5)
    if name == "wgrad tiles":
        fit["a"] = small().bfloat16()
    if name == "pack tiles":
        fit |= {"weight": ones(1, 2, 1, 3, 3, 5, 5), "out": ones(2 * 9 * pairs).bfloat16()}
    if name == "pack":
        fit |= {"weight": ones(1, 2, 1, 3, 3, 5, 5), "out": ones(2 * 36 * weights)}
    return {argument.name: fit[argument.name] for argument in op_of(name).default._schema.arguments}


def op_of(name: str):
    variants = {"few": "conv", "tiles": "conv", "wgrad tiles": "conv_wgrad", "pack tiles": "pack"}
    return getattr(torch.ops.unetpp_fast_cpu, variants.get(name, name))


OPS = (
    "conv", "few", "pack", "conv_wgrad", "pool", "pool_backward", "head", "head_backward", "norm_sums", "norm_apply",
    "act_backward", "tiles", "wgrad tiles", "pack tiles",
)  # fmt: skip
DENSE = ("ua", "ub", "bias", "border", "stats", "weight", "averages", "sums", "scratch")
EVERYWHERE: dict[str, Callable[[Tensor], object]] = {
    "double": lambda x: x.double(),
    "integers": lambda x: x.int(),
    "strides": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "device": lambda x: x.to("meta"),
}
SPOILED = {  # by the kind of argument, what does not fit
    "map": {
        "rank": lambda x: x[0],
        "images": lambda x: x[:1],
        "rows": lambda x: x[:, :, 1:],
        "columns": lambda x: x[:, :, :, 1:].contiguous(),
        "depth": lambda x: x.repeat(1, 2, 1, 1, 1),
        "channels": lambda x: x[..., :-1],
        "no channels": lambda x: x[..., :0],
        "layout": lambda x: x.transpose(3, 4).contiguous().transpose(3, 4),
        "spacing": lambda x: x.repeat_interleave(2, 2)[:, :, ::2],
    },
    "dense": {"shorter": lambda x: x.flatten()[:-1], "longer": lambda x: torch.cat((x, x), -1)},
    "filters": {
        "rank": lambda x: x[0],
        "filters": lambda x: torch.cat((x, x)),
        "taps": lambda x: torch.cat((x, x), -3),
        "inputs": lambda x: torch.cat((x, x), -2),
        "outputs": lambda x: x[..., :-1],
    },
    "table": {
        "rank": lambda x: x[0],
        "channels": lambda x: x[:, :-1],
        "rows": lambda x: x.repeat(2, 1),
        "none": lambda x: None,
        "other strides": lambda x: x.repeat(1, 2)[:, :5],
    },
}
WHOLE = {
    "way": (-1, 3),
    "linear": (-1, 3),
    "axes": (1, 4),
    "taps": (2, 5),
    "act": (-1, 5),
    "stride": (0, 3),
    "chunk": (0, -1),
    "phased": (False,),
}


def kind(op: str, name: str, value: Tensor) -> str:
    if value.dim() == 7 or name == "result":
        return "filters"
    if name in DENSE or (op.startswith("head") and name in ("out", "dy")) or (op.startswith("pack") and name == "out"):
        return "dense"
    return "map" if value.dim() == 5 else "table"


@needs_library
@pytest.mark.parametrize("op", OPS)
def test_arguments_that_do_not_fit_are_named(op):
    if op.endswith("tiles") and not cpu_ops.matrix_tiles():
        pytest.skip("this CPU has no matrix tiles, and the library for its instruction set does not imitate them")
    run, fit = op_of(op), arguments(op)
    run(**fit)
    names = [name for name, value in fit.items() if isinstance(value, Tensor)]
    for name in names:
        spoiled = {**EVERYWHERE, **SPOILED[kind(op, name, fit[name])]}
        if name == "scratch":
            del spoiled["longer"]
        if kind(op, name, fit[name]) == "filters":
            del spoiled["strides"]  # which may be any
        if op.startswith("pack"):
            spoiled.pop("outputs", None)  # there is a block of outputs in any case
        if op == "pack tiles":
            spoiled.pop("inputs", None)  # and one of inputs
        if op.startswith("norm"):
            spoiled.pop("none", None)  # nothing is optional there
        for what, spoil in spoiled.items():
            changed = arguments(op)
            changed[name] = spoil(changed[name])
            assert_raises(lambda: run(**changed), names, f"{op} with another {name}: {what}")  # noqa: B023
    for name, values in WHOLE.items():
        for value in values if name in fit else ():
            assert_raises(lambda: run(**{**arguments(op), name: value}), [*names, name], f"{op} with {name} {value}")  # noqa: B023


@needs_library
@pytest.mark.parametrize(("changes", "words"), [
    ({"mid": (1, 1, 16, 10, 4)}, "mid"), ({"mid": (2, 1, 17, 10, 4)}, "mid"), ({"mid": (1, 1, 17, 9, 4)}, "mid"),
    ({"mid": (1, 2, 17, 10, 4)}, "mid"), ({"mid": (1, 1, 17, 10, 5)}, "ua|second"), ({"a": (2, 1, 5, 10, 5)}, "a is"),
    ({"a": (1, 1, 6, 10, 5)}, "images"), ({"second": (1, 1, 1, 3, 3, 5, 3)}, "second"),
    ({"second": (1, 1, 1, 2, 2, 4, 3)}, "second"), ({"second": (17,)}, "second"), ({"bias": (5,)}, "bias"),
    ({"second_bias": (4,)}, "second_bias"),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_named(changes, words):
    fit = {"out": (2, 1, 6, 10, 3), "mid": (1, 1, 17, 10, 4), "a": (2, 1, 6, 10, 5), "ua": (1, 1, 1, 3, 3, 5, 4),
           "second": (1, 1, 1, 3, 3, 4, 3), "bias": (4,), "second_bias": (3,)}  # fmt: skip
    rest = {"b": None, "ub": None, "border": None, "phased": False, "linear": 0, "slope": 0.0}
    run = torch.ops.unetpp_fast_cpu.conv_pair
    run(**{name: torch.ones(shape) for name, shape in fit.items()}, **rest)
    with pytest.raises(RuntimeError, match=words):
        run(**{name: torch.ones(shape) for name, shape in {**fit, **changes}.items()}, **rest)


@needs_library
@pytest.mark.skipif(not cpu_kernels.has_library() or not cpu_ops.matrix_tiles(), reason="this CPU has no matrix tiles")
def test_a_pair_of_float_maps_takes_no_weights_for_tiles():
    out, mid, a = (torch.ones(shape) for shape in ((2, 1, 6, 10, 3), (1, 1, 17, 10, 4), (2, 1, 6, 10, 5)))
    packed = torch.ones(9 * 32 * 2 * torch.ops.unetpp_fast_cpu.lanes()).bfloat16()
    with pytest.raises(RuntimeError, match="second"):
        torch.ops.unetpp_fast_cpu.conv_pair(
            out, mid, a, torch.ones(1, 1, 1, 3, 3, 5, 4), None, None, None, None, packed, None, False, 0, 0.0
        )


def assert_raises(run: Callable[[], None], names: list[str], what: str) -> None:
    """A RuntimeError whose message has one of the names."""
    try:
        run()
    except RuntimeError as error:
        words = set(re.findall(r"\w+", re.sub(r"^.*?\.cpp:\d+, ", "", str(error))))
        plain = {name.removesuffix("_a").removesuffix("_b") for name in names}
        assert words & {*plain, "Meta", "phases"}, f"{what}: {error}"
    else:
        raise AssertionError(f"{what} raises nothing")


GRID = """
import sys, torch
load = torch.ops.load_library
torch.ops.load_library = lambda path: load(sys.argv[1])  # in place of the library of the package
from support import cpu_kernels
from support.csrc import builder
cpu_kernels.run_small_grid(sys.argv[1], getattr(cpu_kernels, sys.argv[2]))
"""


def run_grid(library: Path, inputs: str, **environment: str) -> tuple[int, int]:
    """Lanes of the library's vectors and the number of calls, from a process that runs the small grid with it."""
    command = [sys.executable, "-c", GRID, str(library), inputs]
    paths = {"PYTHONPATH": os.pathsep.join((str(ROOT / "tests"), str(ROOT)))}
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **paths, **environment})
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
    lanes, count = done.stdout.split()
    return int(lanes), int(count)


@needs_library
@pytest.mark.parametrize("name", LANES)
def test_every_instruction_set(name):
    lanes, calls = run_grid(libraries.FOLDER / "unetpp_fast_cpu.so", "CpuInputs", UNETPP_FAST_ISA=name)
    if lanes != LANES[name]:
        pytest.skip(f"this CPU or this build has no {name}")
    assert calls > 50


def sanitized() -> Path:
    """The library with the sanitizers, built again when a source has changed; kept in `build/`, which git ignores."""
    files = [SOURCES / "build.py", *sorted((SOURCES / "cpu").iterdir())]
    text = b"".join(path.read_bytes() for path in files) + " ".join((torch.__version__, *SANITIZERS)).encode()
    folder = ROOT / "build" / "cpu_sanitized"
    library = folder / hashlib.sha256(text).hexdigest()[:16] / "unetpp_fast_cpu.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes run side by side
        if not library.exists():
            for old in folder.glob("*/"):
                shutil.rmtree(old)
            builder().build("cpu", library, library.parent / "objects", extra=SANITIZERS)
    return library


def runtime(name: str) -> str:
    """The path of a sanitizer's library, "" if the compiler has none."""
    compiler = builder().find_compiler()
    if compiler is None:
        return ""
    path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return path if os.path.isabs(path) else ""


@pytest.mark.skipif(not runtime("libasan.so"), reason="there is no C++ compiler with AddressSanitizer")
@pytest.mark.parametrize("name", LANES)
def test_sanitizers_find_nothing(name):
    """Under AddressSanitizer and UBSan; maps and weights end where their memory ends, and new memory holds NaN."""
    preloaded = f"{runtime('libasan.so')} {runtime('libstdc++.so.6')}"
    memory = "detect_leaks=0:malloc_fill_byte=255:max_malloc_fill_size=1073741824"
    options = {"ASAN_OPTIONS": memory, "UBSAN_OPTIONS": "print_stacktrace=1", "LD_PRELOAD": preloaded}
    lanes, calls = run_grid(sanitized(), "TightInputs", UNETPP_FAST_ISA=name, **options)
    if lanes != LANES[name]:
        pytest.skip(f"this CPU or this build has no {name}")
    assert calls > 50
