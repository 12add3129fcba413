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
import candidates
import torch
from bounds import Work
from compiled_cuda import Counts, Launch, counts, work
from kept import keep
from recording import CUDNN, Recorded, eager_pass, fused_pass

from unetpp_fast.models.architectures import PAPER_FEATURES, UNetPlusPlus

TARGETS = {"inference": 2.5, "training": 1.8}
SHOWN = 24  # kernels of a table; the rest is one row
PARTS = ("tensor", "issue", "shared", "l2", "dram")
OVERLAPS = {"seconds": "all parts at once:", "in_turn": "products, then other slots:", "serial": "one part after another:"}
ASSUMED = """\
COMPUTED, NOT MEASURED: the paper's UNet++ at {size}², bfloat16, batch {images}, on an H100.
A kernel takes the longest of its parts' times, or more: stalls, waits and bank conflicts are not counted, nor are
Triton's issue slots, launches, the loss and the optimizer.
Eager: weights and maps in bfloat16, channels-last. Its convolutions are taken to reach, by the narrower of their sides,
{rates} TFLOP/s, all stalls included, and to read and write their maps once, the
bias for nothing; all other operators move their bytes at DRAM's full rate, without casts and launches. So eager beats this
estimate only where cuDNN beats those rates. They hold all that delays cuDNN's kernels, and the fused ones are summed from
their parts: one part after another is unkind to these, all at once is kind to them.
"""


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


def summary(kind: str, fused: list[Work], eager: list[Work], images: int) -> list[str]:
    """Both passes in milliseconds an image and their ratio, and whether that meets the goal, by how parts overlap."""
    lines = []
    for name, how in OVERLAPS.items():
        mine, theirs = (1e3 * sum(getattr(work, name) for work in works) / images for works in (fused, eager))
        verdict = "met" if theirs / mine >= TARGETS[kind] else "missed"
        figures = f"fused {mine:.2f} ms, eager {theirs:.2f} ms, ratio {theirs / mine:.2f}"
        lines.append(f"{kind}, {how:<32} {figures}, goal {TARGETS[kind]}: {verdict} (computed)")
    return lines


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
    rates = ", ".join(f"{rate / 1e12:.0f} ({width}{' and wider' * (width == max(CUDNN))})" for width, rate in CUDNN.items())
    print(ASSUMED.format(size=given.size, images=given.images, rates=rates))
    for kind in ("inference", "training"):
        network.train(kind == "training")
        fused = completed(fused_pass(network, x, kind == "training"))
        eager = completed(eager_pass(network, x, kind == "training"))
        print(f"{kind}, microseconds an image (computed)", *table(fused, given.images), sep="\n")
        print(*summary(kind, fused, eager, given.images), "", sep="\n")
    print("candidates, best bound first (computed)", *candidates.table(given.images, given.size), sep="\n")


if __name__ == "__main__":
    main()
