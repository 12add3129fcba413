"""`make gpu-prepare`: compiles the Triton kernels that `make gpu-check` runs, on a machine without a GPU.

A first run on a GPU otherwise spends its minutes compiling. The parts of gpu_check.py are collected as pytest would run
them, their passes run over meta tensors to see what they compile (`kernel_variants.py`), and that is compiled in several
processes, first what the first parts need. The results lie in a folder by version of Triton and state of the kernels'
sources (`compiled_ahead.py`); take it along, and gpu_check.py puts them into Triton's cache. A second call continues.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

os.environ["TRITON_INTERPRET"] = "0"  # read when the kernels are imported
sys.path.append(str(Path(__file__).parents[1] / "tests"))
sys.path.append(str(Path(__file__).parents[1] / "tests" / "execution"))

import compiled_ahead
import gpu_check
import pytest
import torch
import triton
from kernel_variants import StandIn, Variant, recorded, run_pass
from triton.backends.compiler import GPUTarget

from unetpp_fast.benchmarking.case import Case, Unavailable
from unetpp_fast.kernels import tuning

ROOT = Path(__file__).resolve().parents[1]
META = torch.device("meta")
ENGINES = ("triton", "cuda")


class Collected:
    """A plugin of pytest that keeps which benchmark cases a command line selects, and whether it tunes them."""

    def __init__(self) -> None:
        self.cases: dict[Case, None] = {}
        self.tests, self.tune = False, False

    def pytest_collection_finish(self, session) -> None:
        for item in session.items:
            if "benchmarks" in item.path.parts:
                if "fused" in item.callspec.params["name"]:
                    self.cases[item.callspec.params["case"]] = None
                self.tune = session.config.getoption("tune")
            else:
                self.tests = True


def collected(part: gpu_check.Part) -> Collected:
    """What the pytest command of a part selects."""
    found = Collected()
    arguments = part.command[part.command.index("pytest") + 1 :]
    with redirect_stdout(StringIO()) as output:
        code = pytest.main([*arguments, "--collect-only", f"--rootdir={ROOT}"], plugins=[found])
    if code:
        raise RuntimeError(f"pytest cannot collect the part {part.name!r}: {output.getvalue()[-2000:]}")
    return found


@contextmanager
def on_meta() -> Iterator[None]:
    """Inside, what moves to a GPU becomes meta tensors, and random operands are not drawn."""
    import op_makers

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.Module, "cuda", lambda module: module.to(META)))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor.to(META)))
        stack.enter_context(mock.patch.object(op_makers.Maps, "values", lambda maps, *shape, **_: _empty(*shape)))
        yield


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device=META)


def cases_of_tests(everything: bool) -> Iterator[tuple]:
    """The passes of the tests on a GPU, as `run_pass` takes them: the bfloat16 cases, or the rest of `gpu_check.TESTS`."""
    import test_on_gpu as tests
    from support.helpers import build

    import unetpp_fast as uf

    precision = torch.backends.cudnn.conv
    before = precision.fp32_precision
    for dtype in ("float32", "tf32", "float16") if everything else ("bfloat16",):
        precision.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
        for axes, options in tests.CASES:
            if everything and (options["upsample"] != "deconv" or (axes == 3 and dtype != "float16")):
                continue
            yield tests.network(axes, **options), tests.image(axes).requires_grad_(), kind, "triton", True
    precision.fp32_precision = before
    if not everything:
        return
    for batch in (1, 2, 3):
        yield tests.network(2), tests.image(2, batch), torch.float32, "triton", False
    small = {"features": (16, 32), "deep_supervision": True}
    for norm in (None, "batch", "instance"):
        yield (
            build(uf.UNetPlusPlus, 1, 2, norm=norm, **small),
            _empty(2, 1, 8, 12).requires_grad_(),
            torch.float32,
            "triton",
            True,
        )
    yield tests.network(2, features=(16, 32)), tests.image(2, multiple=2), torch.float32, "triton", True
    trained = uf.UNetPlusPlus(1, 1, features=(16, 32, 64), deep_supervision=True)
    yield trained, _empty(8, 1, 48, 48), torch.bfloat16, "triton", True
    for axes in (2, 3):
        for dtype in (torch.float16, torch.bfloat16):
            yield tests.network(axes, norm="batch"), _empty(2, 2, *(20, 36, 12)[:axes]), dtype, "cuda", True


def run_case(case: Case, tune: bool) -> None:
    """What a benchmark case launches of the kernels; with `tune` first every candidate, as `unetpp_fast.tune` does."""
    import cases
    import op_cases

    from unetpp_fast.execution.fused.ops import load_ops

    if case.bench == "kernel":
        op = op_cases.make(case, META, case.torch_dtype, case.batch)
        runs = [lambda name=name: op.ours(load_ops(name)) for name in ENGINES]
    else:
        try:
            network = cases.network(case)
        except Unavailable:
            return
        x = _empty(case.batch, network.topology.in_channels, *case.size)
        kinds = (False, True) if tune and case.training else (case.training,)
        runs = [
            lambda name=name, kind=kind: run_pass(network, x, case.torch_dtype, name, kind)
            for kind in kinds
            for name in ENGINES
        ]
    with mock.patch.dict(tuning.table, clear=True):
        for run in runs:
            run()
        if tune:
            with tuning.measuring(lambda launch: launch() or 0.0):
                for run in runs:
                    run()


def variants(target: GPUTarget) -> Iterator[tuple[str, list[Variant]]]:
    """Part by part, what it compiles for a GPU and no earlier part does."""
    known: set[Variant] = set()
    tested = False
    os.chdir(ROOT)
    for part in gpu_check.parts(ROOT / "build", dry_run=False):
        if part.name in ("ahead", "sanitizer"):  # the one launches nothing, the other what the tests launch
            continue
        chosen = collected(part)
        with on_meta(), recorded(target) as found:
            if chosen.tests:
                for arguments in cases_of_tests(everything=tested):
                    run_pass(*arguments)
                tested = True
            for case in chosen.cases:
                run_case(case, chosen.tune)
        new = [variant for variant in found if variant not in known]
        known.update(new)
        yield part.name, new


def compile_all(work: list[Variant], folder: Path, target: GPUTarget, jobs: int) -> int:
    """Compiles variants into files, in this order; returns how many could not be compiled."""
    began, failed = time.monotonic(), 0
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        waiting = [pool.submit(compiled_ahead.compile_into, folder, variant, target) for variant in work]
        for count, job in enumerate(as_completed(waiting), 1):
            if reason := job.result():
                failed += 1
                print(reason, file=sys.stderr)
            if count % 50 == 0 or count == len(work):
                print(f"{count} of {len(work)} after {time.monotonic() - began:.0f} s", flush=True)
    return failed


def check(folder: Path, target: GPUTarget, parts: list[str]) -> int:
    """Puts the kernels of a folder into an empty cache, as on a machine with that GPU, and prints by part how many of those
    that it launches Triton finds there; `parts`: only of these, unless empty. Returns how many it would compile."""
    missing, count = 0, 0
    with TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        triton.runtime.driver.set_active(StandIn(target))
        print(f"{compiled_ahead.put(folder)} kernels put into Triton's cache", flush=True)
        for name, wanted in variants(target):
            if parts and name not in parts:
                continue
            found = sum(compiled_ahead.is_cached(variant, target) for variant in wanted)
            missing, count = missing + len(wanted) - found, count + len(wanted)
            print(f"{name:<10} {found} of {len(wanted)} kernels are in hand", flush=True)
    print(f"{count - missing} of {count} kernels are in hand" + "; `make gpu-prepare` compiles the rest" * (missing > 0))
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=compiled_ahead.FOLDER, help="folder (default: %(default)s)")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU (default: 90, an H100 or H200)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--parts", default="", help="only the parts of these names, separated by commas")
    parser.add_argument("--check", action="store_true", help="compile nothing; fail if a kernel is missing")
    options = parser.parse_args()
    target = GPUTarget("cuda", options.capability, 32)
    folder = compiled_ahead.folder(target, options.out)
    chosen = options.parts.split(",") if options.parts else []
    if options.check:
        return int(check(folder, target, chosen) > 0)
    work = []
    for name, found in variants(target):
        if not chosen or name in chosen:
            missing = [variant for variant in found if not compiled_ahead.path(folder, variant).exists()]
            print(f"{name:<10} {len(found):5} kernels, {len(missing)} of them to compile", flush=True)
            work += missing
    failed = compile_all(work, folder, target, options.jobs)
    size = sum(path.stat().st_size for path in folder.glob("*.zip")) / 2**20
    print(f"{folder}: {size:.1f} MiB")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
