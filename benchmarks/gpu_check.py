"""`make gpu-check OUT=folder`: tests and measures the kernels on this machine's GPU, the most important part first.

Each part is a process with a time limit and a log in the folder. Finished parts are marked there, so a second call
continues where the first one stopped. Records are written to the folder's `results/` after each case. All limits
together are under ten minutes. It needs torch, triton, numpy and pytest, and no network.

Most of that time would go into compiling kernels. `make gpu-prepare` does so beforehand on any machine, and the first part
puts them into Triton's cache (`compiled_ahead.py`).

--dry-run runs the same parts in the same order on a CPU, with tiny inputs and the reference in place of the kernels, and
says when each would begin at the latest. Its last part looks up every kernel that the others would launch, as a GPU's
driver would, and fails if one is not compiled. Its records say nothing about the kernels: they are kept in `dry-run/`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = "-eager or -fused"
CPU_LIMIT = 900  # seconds of a part in a dry run, whose times mean nothing
# Of the same tests in other precisions one case, in float16 one in 3D too: each has fifty kernels to compile.
TESTS = "not two_times_rule or bfloat16 or deconv and (batch or float16)"
FIVE_CASES = "two_times_rule and bfloat16"  # of tests/execution/test_on_gpu.py: each norm, up-sampling and number of axes


@dataclass(frozen=True)
class Part:
    """A command with its time limit in seconds."""

    name: str
    limit: int
    command: tuple[str, ...]
    obstacle: str = ""  # why it cannot run here
    always: bool = False  # in a second call too


def parts(out: Path, dry_run: bool) -> list[Part]:
    """The parts in the order in which they run."""
    pytest = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    records = ("--results", str(out / "results"), *(("--dry-run",) if dry_run else ()))
    sanitizer = shutil.which("compute-sanitizer")

    def models(name: str, limit: int, cases: str, *options: str, sides: str = OURS) -> Part:
        chosen = ("benchmarks/test_models.py", "-k", f"({cases}) and ({sides})", "--seconds", "2")
        return Part(name, limit, (*pytest, *chosen, *options, *records))

    kernels = "tests/execution/test_on_gpu.py"
    proofs = (kernels, "tests/csrc/test_cuda_on_gpu.py", "tests/training/test_captured_on_gpu.py")
    few = "(two_times_rule or networks) and bfloat16 or second_stream"
    paper, pruned, deep = "unet++-L4-accurate", "inference-unet++-L", "unet++-3d-L4-accurate"
    large, small, volume = (f"{size}-bfloat16" for size in ("512x512-batch16", "96x96-batch1", "64x64x64-batch1"))
    both = f"(inference-{paper} or training-{paper})"
    compiled = OURS if dry_run else "(-eager or -fused or -compile) and not max"
    levels = " or ".join(f"{512 >> level}x{512 >> level}-batch16-bfloat16" for level in range(5))
    ops = ("benchmarks/test_kernels.py", "-k", levels, "--seconds", "0.2", "--tune")
    ahead = Part("ahead", 30, (sys.executable, "benchmarks/compiled_ahead.py"), always=True)
    look_up = Part("ahead", 300, (sys.executable, "benchmarks/gpu_prepare.py", "--check"), always=True)
    order = [
        Part("cases", 60, (*pytest, kernels, "-k", FIVE_CASES)),
        models("inference", 40, f"inference-{paper} and {large}"),
        models("training", 60, f"training-{paper} and {large}"),
        models("main", 110, f"({both} or memory-{paper}) and {large}", "--tune", sides=compiled),
        models("small", 40, f"{both} and {small}", "--tune"),
        Part("tests", 75, (*pytest, *proofs, "-k", TESTS)),
        models("pruned", 40, f"{pruned} and fast and {large}", "--tune"),
        models("volume", 45, f"({' or '.join(f'{what}-{deep}' for what in ('inference', 'training', 'memory'))}) "
               f"and {volume}"),
        Part("kernels", 50, (*pytest, *ops, *records)),
        Part("sanitizer", 40, (str(sanitizer), "--tool", "memcheck", "--error-exitcode", "9", *pytest, *proofs, "-k", few),
             "" if sanitizer else "compute-sanitizer is not on the path"),
    ]  # fmt: skip
    return [*order, look_up] if dry_run else [ahead, *order]


def run(part: Part, out: Path) -> str:
    """Runs a part unless it is done; returns "done", "failed (code)", "out of time" or why it was skipped.

    What the part measures of the kernels is kept in the folder too, key by key, for later parts and calls.
    """
    mark, log = out / f"{part.name}.done", out / f"{part.name}.log"
    if mark.exists() and not part.always:
        return "done before"
    if part.obstacle:
        return f"skipped: {part.obstacle}"
    with open(log, "w") as stream:
        stream.write(" ".join(part.command) + "\n")
        stream.flush()
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "UNETPP_FAST_CACHE": str(out / "tuning")},
        )  # fmt: skip
        try:
            code = process.wait(part.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return f"out of time after {part.limit} s"
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if code:
        return f"failed ({code}): see {log}"
    mark.touch()
    return f"done: {log.read_text().splitlines()[-1]}" if part.always else "done"


def install(out: Path) -> str:
    """Installs the package if `unetpp_fast.kernels` cannot be imported; returns what went wrong, or ""."""
    if importlib.util.find_spec("unetpp_fast") and importlib.util.find_spec("unetpp_fast.kernels"):
        return ""
    import torch

    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-e", str(ROOT)]
    environment = {**os.environ, "PIP_BREAK_SYSTEM_PACKAGES": "1"}
    if torch.cuda.is_available():  # compile csrc/ for this GPU only
        environment.setdefault("TORCH_CUDA_ARCH_LIST", "{}.{}".format(*torch.cuda.get_device_capability()))
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    (out / "install.log").write_text(done.stdout + done.stderr)
    return "" if done.returncode == 0 else f"the package cannot be installed: see {out / 'install.log'}"


def obstacle(dry_run: bool) -> str:
    """Why nothing can be checked here, or ""."""
    for module in ("torch", "numpy", "pytest"):
        if not importlib.util.find_spec(module):
            return f"{module} is not installed for {sys.executable}"
    import torch

    if not dry_run and not torch.cuda.is_available():
        return "no CUDA device that torch can use: run it on a machine with a GPU, or add --dry-run"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for records and logs; a second call continues there")
    parser.add_argument("--dry-run", action="store_true", help="test this script on a CPU, with tiny inputs")
    options = parser.parse_args()
    out = options.out.resolve() / ("dry-run" if options.dry_run else "")
    if reason := obstacle(options.dry_run):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    if reason := install(out):
        print(f"gpu-check: {reason}", file=sys.stderr)
        return 1
    good, latest = True, 0
    for part in parts(out, options.dry_run):
        latest, limit = latest + part.limit, part.limit
        if options.dry_run:
            print(f"{part.name:<10} begins after {latest - limit} s at the latest and may take {limit} s", flush=True)
            part = replace(part, limit=CPU_LIMIT)
        began = time.perf_counter()
        result = run(part, out)
        good &= result.startswith(("done", "skipped"))
        line = f"{part.name:<10} {time.perf_counter() - began:6.0f} s  {result}"
        print(line, flush=True)
        with open(out / "summary.txt", "a") as stream:
            stream.write(line + "\n")
    print(f"records: {out / 'results'}")
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
