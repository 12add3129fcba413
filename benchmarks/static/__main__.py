"""Least times of a whole network on an H100, computed from the compiled kernels: `python benchmarks/static`.

No GPU is needed, and nothing is measured: a kernel cannot be faster than the slowest of its parts, and how well they
overlap only a GPU can tell. Prints the paper's UNet++ at inference and in a training step, an estimate of PyTorch's eager
pass by the same arithmetic, and the candidate configurations of convolutions in the order of their bounds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))  # the interpreter of compiled kernels
import torch
from bounds import Work
from compiled_cuda import PHASES, Counts, Launch, conv, counts, kernels, work
from kept import keep
from recording import DTYPE, Recorded, eager_pass, fused_pass, of_conv, recorded

from unetpp_fast.kernels import cuda_ops, triton_ops
from unetpp_fast.kernels.conv_configs import Config, configs
from unetpp_fast.models.architectures import PAPER_FEATURES, UNetPlusPlus

TARGETS = {"inference": 2.5, "training": 1.8}
SHOWN = 24  # kernels of a table; the rest is one row
PARTS = ("tensor", "issue", "shared", "l2", "dram")


def completed(recorded: list[Recorded]) -> list[Work]:
    """With the demands of CUDA kernels, from their instructions."""
    counted = counts([found[1] for found in recorded if isinstance(found, tuple)])
    return [_complete(found, counted) if isinstance(found, tuple) else found for found in recorded]


def _complete(found: tuple[Work, Launch], counted: dict[str, Counts]) -> Work:
    base, launch = found
    return work(base.name, launch, counted[launch.key], base.flops, base.dram)


def table(works: list[Work], images: int) -> list[str]:
    """Kernels by their share of the time, in microseconds an image."""
    by_name: dict[str, list[Work]] = {}
    for one in works:
        by_name.setdefault(one.name, []).append(one)
    rows = sorted(by_name.items(), key=lambda row: -sum(one.seconds for one in row[1]))
    lines = [f"{'kernel':<42} {'n':>4} {'us/image':>9} {'TFLOP/s':>8}  bound   " + "".join(f"{part:>9}" for part in PARTS)]
    for name, same in [*rows[:SHOWN], ("the rest", [one for _, group in rows[SHOWN:] for one in group])]:
        if not same:
            continue
        scale = 1e6 / images
        seconds = sum(one.seconds for one in same)
        rate = sum(one.flops for one in same) / seconds / 1e12
        parts = "".join(f"{scale * sum(one.bounds()[part] for one in same):>9.1f}" for part in PARTS)
        binding = same[0].binding if name != "the rest" else ""
        lines.append(f"{name:<42} {len(same):>4} {scale * seconds:>9.1f} {rate:>8.0f}  {binding:<8}{parts}")
    return lines


def summary(kind: str, fused: list[Work], eager: list[Work], images: int) -> str:
    """Both passes in milliseconds an image, and their ratio, with all parts of the GPU at work at once and one by one."""
    rows = []
    for name, how in (("seconds", "at once"), ("serial", "one by one")):
        mine, theirs = (1e3 * sum(getattr(work, name) for work in works) / images for works in (fused, eager))
        rows.append(f"parts {how}: fused {mine:.2f} ms, eager {theirs:.2f} ms, ratio {theirs / mine:.2f}")
    return f"{kind} (computed, goal {TARGETS[kind]})  " + "; ".join(rows)


def candidates(images: int, size: int) -> list[str]:
    """The configurations of a few convolutions, CUDA's and Triton's, the best bound first."""
    columns = "bound    registers  instructions of a warp by phase, while loading a copy"
    lines = [f"{'convolution':<18} {'configuration':<38} {'TFLOP/s':>8}  {columns}"]
    for k, co, norm in [(k, co, norm) for norm in (False, True) for k, co in ((32, 32), (192, 32), (64, 64), (128, 128))]:
        out, a = (torch.empty(images, 1, size, size, width, dtype=DTYPE, device="meta") for width in (co, k))
        weights, row = torch.empty(9, k, co, dtype=DTYPE, device="meta"), torch.empty(1, k, device="meta")
        call = cuda_ops.ConvCall(
            out, a, weights, axes=2, taps=3, stride=1, phased=False, affine_a=(row, row) if norm else None, b=None, wb=None,
            affine_b=None, slope=0.0, bias=torch.empty(co, device="meta"), border=None, act=not norm, add=False, stats=norm,
        )  # fmt: skip
        found = [_cuda_candidate(call, config) for config in (cuda_ops.configs(co, False) if co <= cuda_ops.WIDEST else ())]
        found += [_triton_candidate(call, config) for config in configs(tuple(out.shape[1:4]), images, co, 2, False, DTYPE)]
        for one, shape, text in sorted(found, key=lambda each: each[0].seconds):
            name = f"{k}→{co}{' norm stats' * norm}"
            lines.append(f"{name:<18} {shape:<38} {one.tflops:>8.0f}  {one.binding:<8} {text}".rstrip())
    return lines


def _cuda_candidate(call: cuda_ops.ConvCall, config: cuda_ops.ConvConfig) -> tuple[Work, str, str]:
    launch, base = conv(config, call.out, call.a, call.b, vars(call)), of_conv(call)
    counted = counts([launch])[launch.key]
    (registers,) = (number for kernel, (_, number) in kernels().items() if launch.kernel in kernel)
    text = f"{registers:>9}  {', '.join(f'{phase} {counted.total(phase):.0f}' for phase in PHASES)}"
    if config.stages == 1:  # else loads are among the products
        text += f"; {counted.total('load') / counted.of('LDGSTS'):.0f} a copy"
    shape = f"cuda {config.rows} x {config.columns} x {config.block_co}, {config.stages} stages"
    return work(base.name, launch, counted, base.flops, base.dram), shape, text


def _triton_candidate(call: cuda_ops.ConvCall, config: Config) -> tuple[Work, str, str]:
    with recorded() as found:
        triton_ops.conv_by(triton_ops.Way(config), **vars(call))
    (one,) = (one for one in found if one.name.startswith("triton conv"))
    shape = f"triton {config.pixels} x {config.block_k} x {config.block_co}"
    return one, f"{shape}, {config.num_warps} warps, {config.num_stages} stages", ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--size", type=int, default=512, help="of the image, a multiple of 16 (%(default)s)")
    parser.add_argument("--images", type=int, default=16, help="of a batch (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="write the counts of instructions that a test compares")
    given = parser.parse_args()
    if given.keep:
        keep()
        return
    with torch.device("meta"):
        network = UNetPlusPlus(1, 1, features=PAPER_FEATURES["unet++"], norm=None, deep_supervision=True)
        x = torch.empty(given.images, 1, given.size, given.size)
    print(f"COMPUTED, NOT MEASURED: the paper's UNet++ at {given.size}², bfloat16, batch {given.images}, on an H100.")
    print("A kernel takes the longest of its parts' times, or more: stalls, waits and bank conflicts are not counted,")
    print("nor are Triton's issue slots and shared memory, launches, the loss and the optimizer. Eager: cuDNN at rates")
    print("it is assumed to reach, everything else by its bytes. The ratios say what can be hoped for, not what is.\n")
    for kind in ("inference", "training"):
        network.train(kind == "training")
        fused = completed(fused_pass(network, x, kind == "training"))
        eager = completed(eager_pass(network, x, kind == "training"))
        print(f"{kind}, microseconds an image (computed)", *table(fused, given.images), sep="\n")
        print(summary(kind, fused, eager, given.images), "\n")
    print("candidates, best bound first (computed)", *candidates(given.images, given.size), sep="\n")


if __name__ == "__main__":
    main()
