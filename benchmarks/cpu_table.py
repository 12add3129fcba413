"""The paper's UNet++ (no norm) on a CPU: this package against its alternatives, in inference and training.

`python benchmarks/cpu_table.py` measures every part, prints the table and records the rows. To measure some parts only,
name them: `python benchmarks/cpu_table.py deconv-float32 memory-deconv-float32 pruned-deconv deconv-96x8`.
"""

from __future__ import annotations

import argparse
import dataclasses

import torch

from unetpp_fast.benchmarking import harness, records
from unetpp_fast.benchmarking.case import Case
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common import timing
from unetpp_fast.deployment.optimized import optimize
from unetpp_fast.models.architectures import UNetPlusPlus
from unetpp_fast.models.network import Network

SIZE = (512, 512)
SMALL = ((96, 1), (96, 8), (256, 1), (256, 8))  # more sizes and batches of inference in float32
TRAINING = ((96, 16), (512, 1))  # sizes and batches of a training step
UPSAMPLES = {"nearest": "unet++-nearest", "deconv": "unet++"}
ALTERNATIVES = ("eager-channels-last", "compile", "onnxruntime", "openvino")
OURS = "fused-cpu"
CPU = torch.device("cpu")


def network(model: str, level: int = 4, *, whole: bool = False) -> Network:
    """The paper's network with seeded weights, pruned to `level`, with one head, or the `whole` one, which is trained."""
    upsample = next(name for name, title in UPSAMPLES.items() if title == model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trained = UNetPlusPlus(1, 1, norm=None, upsample=upsample, deep_supervision=True).eval()
    return trained if whole else trained.prune(level)


def compared(case: Case, rounds: int) -> list[dict]:
    """The rows of one model and precision; prints which implementations have none, and why."""
    chosen = {name: IMPLEMENTATIONS[name] for name in (*ALTERNATIVES, OURS)}
    measured = network(case.model, whole=case.training)
    outcome = harness.measure(case, measured, chosen, CPU, rounds=rounds)
    for name, reason in {**outcome.skipped, **outcome.wrong}.items():
        print(f"{case}: {name} has no row: {reason}")
    return outcome.rows


def pruned(model: str, rounds: int) -> list[dict]:
    """The rows of the levels, timed in interleaved runs."""
    case = Case("inference", model, 4, "fast", SIZE, 1, "float32")
    x, _ = harness.make_input(network(model), case, CPU)
    networks = {level: network(model, level) for level in (1, 2, 3, 4)}
    fast = {str(level): optimize(part, dtype=torch.float32) for level, part in networks.items()}
    times = timing.interleaved_times({name: lambda f=f: f(x) for name, f in fast.items()}, CPU, rounds=rounds)
    rows = []
    for level, part in networks.items():
        mine = dataclasses.replace(case, level=level)
        rows += harness.rows_of(mine, CPU, {OURS: times[str(level)]}, {}, part.gflop(SIZE))
        share = part.gflop(SIZE) / networks[4].gflop(SIZE)
        took = 1 / timing.ratios(times, str(level)).get("4", 1.0)
        print(f"{model} L{level}: {took:.3f} x the time of L4, {share:.3f} x its GFLOP")
    return rows


def parts() -> dict[str, tuple[str, Case]]:
    """What can be measured, by name: the kind ("compared" or "pruned") and the case."""
    known: dict[str, tuple[str, Case]] = {}
    for name, model in UPSAMPLES.items():
        for dtype in ("float32", "bfloat16"):
            case = Case("inference", model, 4, "fast", SIZE, 1, dtype)
            known[f"{name}-{dtype}"] = ("compared", case)
            memory = dataclasses.replace(case, bench="memory", memory_of="inference")
            known[f"memory-{name}-{dtype}"] = ("compared", memory)
        for size, batch in SMALL:
            case = Case("inference", model, 4, "fast", (size, size), batch, "float32")
            known[f"{name}-{size}x{batch}"] = ("compared", case)
        for size, batch in TRAINING:
            case = Case("training", model, 4, "accurate", (size, size), batch, "float32")
            known[f"training-{name}-{size}x{batch}"] = ("compared", case)
            memory = dataclasses.replace(case, bench="memory", memory_of="training")
            known[f"memory-training-{name}-{size}x{batch}"] = ("compared", memory)
        known[f"pruned-{name}"] = ("pruned", Case("inference", model, 4, "fast", SIZE, 1, "float32"))
    return known


def line(rows: list[dict]) -> str:
    """One line per part: milliseconds or MB of every implementation, and the ratios of ours to the others."""
    ours = next((row for row in rows if row["impl"] == OURS), None)
    if ours is None:
        return f"no row of {OURS}"
    memory = ours["bench"] == "memory"
    unit, ratios = ("peak_mb", ours["peak_ratio_to"]) if memory else ("median_ms", ours["ratio_to"])
    cells = [f"{row['impl']} {row[unit]:.0f}" for row in rows]
    against = [f"{ratio:.2f} x {name}'s" if memory else f"{ratio:.2f} x as fast as {name}" for name, ratio in ratios.items()]
    size = "x".join(map(str, ours["size"]))
    what = f"{ours.get('memory_of') or ours['bench']} {ours['model']} {size} batch {ours['batch']} {ours['dtype']}"
    what = f"{what}, {'MB' if memory else 'ms'}"
    return f"{what}: {', '.join(cells)}; {OURS}: {', '.join(against)}"


def main() -> None:
    known = parts()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(known)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each part (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every implementation")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(known):
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(known)}")
    torch.set_num_threads(options.threads)
    for name in options.parts or known:
        kind, case = known[name]
        rows = compared(case, options.rounds) if kind == "compared" else pruned(case.model, options.rounds)
        records.merge(records.RESULTS / f"{records.machine(CPU)}.json", rows)
        if kind == "compared":
            print(line(rows), flush=True)


if __name__ == "__main__":
    main()
