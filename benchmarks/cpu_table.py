"""The paper's UNet++ (no norm) on a CPU: this package against its alternatives, in inference and training.

`python benchmarks/cpu_table.py` measures every part, records the rows and prints the table. To measure some parts only,
name them: `python benchmarks/cpu_table.py deconv-float32 memory-deconv-float32 busy-nearest`. `--print` measures nothing and
prints the table of what was recorded.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import cpu_checks
import torch

from unetpp_fast.benchmarking import harness, records
from unetpp_fast.benchmarking.case import Case
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common import timing
from unetpp_fast.common.atomic_files import write_atomic
from unetpp_fast.deployment.optimized import optimize
from unetpp_fast.execution.source_hash import source_hash
from unetpp_fast.models.architectures import UNetPlusPlus
from unetpp_fast.models.network import Network

SIZE = (512, 512)
SMALL = ((96, 1), (96, 8), (224, 1), (224, 8), (256, 1), (256, 8))  # more sizes and batches of inference in float32
TRAINING = ((96, 16), (512, 1))  # sizes and batches of a training step
UPSAMPLES = {"nearest": "unet++-nearest", "deconv": "unet++"}
ALTERNATIVES = ("eager-channels-last", "compile", "onnxruntime", "openvino", "ncnn", "mnn")
OURS, RECOMPUTE = "fused-cpu", "fused-cpu-recompute"
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
    chosen = {name: IMPLEMENTATIONS[name] for name in (*ALTERNATIVES, *([RECOMPUTE] if case.training else []), OURS)}
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


def checks() -> dict[str, Callable[[int, int], dict[str, float]]]:
    """The parts that give no rows, by name: functions of the number of rounds and of threads."""
    known: dict[str, Callable[[int, int], dict[str, float]]] = {"peak": lambda rounds, _: cpu_checks.peak(rounds)}
    for name, model in UPSAMPLES.items():
        known[f"busy-{name}"] = lambda rounds, _, model=model: cpu_checks.busy(network(model), rounds)
        known[f"sweep-{name}"] = lambda _, threads, model=model: cpu_checks.sweep(network(model), threads)
    return known


def parts() -> dict[str, tuple[str, Case]]:
    """What gives rows, by name: the kind ("compared" or "pruned") and the case."""
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
            half = dataclasses.replace(case, dtype="bfloat16")
            known[f"training-{name}-{size}x{batch}-bfloat16"] = ("compared", half)
        known[f"pruned-{name}"] = ("pruned", Case("inference", model, 4, "fast", SIZE, 1, "float32"))
    return known


def cells(row: Mapping, ours: Mapping | None) -> str:
    """A cell of the table: milliseconds or MB, how many times as fast (or as large) ours is, and the error."""
    memory = row["bench"] == "memory"
    text = f"{row['peak_mb']:.0f} MB" if memory else f"{records.digits(row['median_ms'])} ms"
    if ours is not None and ours is not row:
        ratio = (ours["peak_ratio_to"] if memory else ours["ratio_to"]).get(row["impl"])
        text += "" if ratio is None else f" ({ratio:.2f}x)"
    error = row.get("error")
    return text + (f", {error:.0e}" if error is not None and not memory else "") + ("" if records.is_current(row) else " †")


def table(rows: Sequence[Mapping], found: Mapping[str, Mapping]) -> str:
    """The table of these parts and checks."""
    mine = {name: check for name, check in found.items() if name in checks()}
    cases = [case for kind, case in parts().values() if kind == "compared"]
    return markdown(rows, mine, cases, (OURS, RECOMPUTE, *ALTERNATIVES))


def markdown(rows: Sequence[Mapping], found: Mapping[str, Mapping], cases: Sequence[Case], columns: Sequence[str]) -> str:
    """A row for each case that was recorded, a column for each implementation, the first of them ours; then the checks."""
    lines = [f"| | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for case in cases:
        mine = {row["impl"]: row for row in rows if of_case(row, case)}
        if mine:
            size = "x".join(map(str, case.size))
            what = f"{'memory, ' if case.memory_of else ''}{case.memory_of or case.bench}"
            shown = [cells(mine[name], mine.get(columns[0])) if name in mine else "" for name in columns]
            lines.append(f"| {what}, {case.model} {size}, batch {case.batch}, {case.dtype} | {' | '.join(shown)} |")
    about = "Times: how many times as fast ours is, and the relative error against float64. Memory: ours, of theirs."
    listed = []
    for name, check in found.items():
        values = check["values"]
        some = values if len(values) < 8 else dict(sorted(values.items(), key=lambda item: item[1])[:3])
        more = "" if len(some) == len(values) else f" (the least 3 of {len(values)})"
        old = "" if check["source_hash"] == source_hash() else " †"
        listed.append(f"- {name}{more}: {', '.join(f'{key} {value:.2f}' for key, value in some.items())}{old}")
    legend = records.legend("\n".join([*lines, *listed]))
    return "\n".join([*lines, "", about + legend, *listed])


def of_case(row: Mapping, case: Case) -> bool:
    """Whether a row is of a case."""
    what = {**dataclasses.asdict(case), "size": list(case.size)}
    return all(row.get(key) == value for key, value in what.items())


def rows_of(kind: str, case: Case, rounds: int) -> list[dict]:
    """The rows of an entry of `parts`."""
    return compared(case, rounds) if kind == "compared" else pruned(case.model, rounds)


def command(
    about: str,
    known: Mapping[str, Callable[[int], list[dict]]],
    others: Mapping[str, Callable[[int, int], dict[str, float]]],
    show: Callable[[Sequence[Mapping], Mapping[str, Mapping]], str],
) -> None:
    """The command line of a table: measures parts, records them and prints what is recorded.

    Args:
        about: the module's docstring. known: what gives rows, by name, for a number of rounds. others: as `checks`.
        show: the table of rows and checks.
    """
    names = [*known, *others]
    parser = argparse.ArgumentParser(description=about.split("\n\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(names)} (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each part (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of every implementation")
    parser.add_argument("--print", action="store_true", help="print the table of what was recorded; measure nothing")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(names):
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(names)}")
    torch.set_num_threads(options.threads)
    path = records.RESULTS / f"{records.machine(CPU)}.json"
    checked = records.RESULTS / "checks" / path.name
    found = json.loads(checked.read_text()) if checked.exists() else {}
    for name in [] if options.print else options.parts or names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name in others:
            found[name] = {"values": others[name](options.rounds, options.threads), **records.facts(CPU)}
            write_atomic(checked, lambda stream: stream.write(json.dumps(found, indent=1).encode() + b"\n"))
        else:
            records.merge(path, known[name](options.rounds))
    print(f"{records.facts(CPU)['device']}\n\n{show(records.read(path), found)}")


if __name__ == "__main__":
    command(__doc__, {name: partial(rows_of, *part) for name, part in parts().items()}, checks(), table)
