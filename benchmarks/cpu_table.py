"""The table of inference on a CPU: the paper's UNet++ (no norm, 512x512, batch 1), this package against what a user would
take instead. `python benchmarks/cpu_table.py` measures every part, prints the table and keeps its rows; parts can be
named: `python benchmarks/cpu_table.py deconv-float32 memory-deconv-float32 pruned`.
"""

from __future__ import annotations

import argparse
import dataclasses

import implementations
import torch

import unetpp_fast as uf
from unetpp_fast.benchmarking import harness, measuring, records
from unetpp_fast.benchmarking.harness import Case
from unetpp_fast.models.network import Network

SIZE = (512, 512)
UPSAMPLES = {"nearest": "unet++-nearest", "deconv": "unet++"}
RIVALS = ("eager-channels-last", "compile", "onnxruntime", "openvino")
OURS = "fused-cpu"
CPU = torch.device("cpu")


def network(model: str, level: int = 4) -> Network:
    """The paper's network with seeded weights, of one head at `level`."""
    upsample = next(name for name, title in UPSAMPLES.items() if title == model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = uf.UNetPlusPlus(1, 1, norm=None, upsample=upsample, deep_supervision=True).eval()
    return whole.prune(level)


def compared(case: Case, rounds: int) -> list[dict]:
    """The rows of one model and precision: times, or of a memory case peaks, in turns; what has none is printed."""
    chosen = {name: implementations.get(name) for name in (*RIVALS, OURS)}
    outcome = harness.measure(case, network(case.model), chosen, CPU, rounds=rounds)
    for name, reason in {**outcome.skipped, **outcome.wrong}.items():
        print(f"{case}: {name} has no row: {reason}")
    return outcome.rows


def pruned(model: str, rounds: int) -> list[dict]:
    """The rows of the levels, timed in turns."""
    case = Case("inference", model, 4, "fast", SIZE, 1, "float32")
    x, _ = harness.make_input(network(model), case, CPU)
    networks = {level: network(model, level) for level in (1, 2, 3, 4)}
    fast = {str(level): uf.optimize(part, dtype=torch.float32) for level, part in networks.items()}
    times = measuring.times_in_turns({name: lambda f=f: f(x) for name, f in fast.items()}, CPU, rounds=rounds)
    rows = []
    for level, part in networks.items():
        mine = dataclasses.replace(case, level=level)
        rows += harness.rows_of(mine, CPU, {OURS: times[str(level)]}, {}, part.gflop(SIZE))
        share = part.gflop(SIZE) / networks[4].gflop(SIZE)
        took = 1 / measuring.ratios(times, str(level)).get("4", 1.0)
        print(f"{model} L{level}: {took:.3f} of the time of L4, {share:.3f} of its GFLOP")
    return rows


def parts() -> dict[str, tuple[str, Case]]:
    """What can be measured, by name: with which function, of which case."""
    found: dict[str, tuple[str, Case]] = {}
    for name, model in UPSAMPLES.items():
        for dtype in ("float32", "bfloat16"):
            case = Case("inference", model, 4, "fast", SIZE, 1, dtype)
            found[f"{name}-{dtype}"] = ("compared", case)
            memory = dataclasses.replace(case, bench="memory", memory_of="inference")
            found[f"memory-{name}-{dtype}"] = ("compared", memory)
        found[f"pruned-{name}"] = ("pruned", Case("inference", model, 4, "fast", SIZE, 1, "float32"))
    return found


def line(rows: list[dict]) -> str:
    """One line a part: milliseconds or MB of every implementation, and by how much ours is ahead."""
    ours = next((row for row in rows if row["impl"] == OURS), None)
    if ours is None:
        return "no row of ours"
    memory = ours["bench"] == "memory"
    unit, ratios = ("peak_mb", ours["peak_ratio_to"]) if memory else ("median_ms", ours["ratio_to"])
    cells = [f"{row['impl']} {row[unit]:.0f}" for row in rows]
    ahead = [f"{ratio:.2f} of {name}" if memory else f"{ratio:.2f}x {name}" for name, ratio in ratios.items()]
    what = f"{ours['model']} {ours['dtype']} {'MB' if memory else 'ms'}"
    return f"{what}: {', '.join(cells)}; ours: {', '.join(ahead)}"


def main() -> None:
    known = parts()
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each part (default 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every implementation")
    given = parser.parse_args()
    if unknown := set(given.parts) - set(known):
        parser.error(f"{sorted(unknown)} cannot be measured: choose from {', '.join(known)}")
    torch.set_num_threads(given.threads)
    for name in given.parts or known:
        kind, case = known[name]
        rows = compared(case, given.rounds) if kind == "compared" else pruned(case.model, given.rounds)
        records.merge(records.RESULTS / f"{records.machine(CPU)}.json", rows)
        if kind == "compared":
            print(line(rows), flush=True)


if __name__ == "__main__":
    main()
