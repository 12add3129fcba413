"""The report of `unetpp-fast bench`: PyTorch, PyTorch compiled and this package, for one network on this machine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from ..architecture.precision import autocast
from ..common import devices, progress
from ..execution import dispatch
from ..execution.call import Call
from ..models.network import Network
from .case import Builder, Case, with_backend
from .harness import Pass, make_input, measure
from .implementations import IMPLEMENTATIONS

SHOWN = ("eager", "eager-channels-last", "compile", "fused")


def largest_batch(fits: Callable[[int], bool], limit: int = 4096) -> int:
    """The largest batch for which `fits`, found by doubling and halving; 0 if not even one image does."""
    most = 0
    while most < limit and fits(max(2 * most, 1)):
        most = max(2 * most, 1)
    step = most // 2 if most < limit else 0
    while step:
        if fits(most + step):
            most += step
        step //= 2
    return most


def batch_fits(network: Network, build: Builder, case: Case, device: torch.device, batch: int) -> bool:
    """Whether a GPU has the memory for a batch."""
    try:
        x, count = make_input(network, dataclasses.replace(case, batch=batch), device)
        Pass(build(network, x, case), case, count)()
        devices.wait(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        torch.cuda.empty_cache()
    return True


def report(network: Network, size: Sequence[int], batch: int, dtype: str, device: torch.device, seconds: float) -> list[str]:
    """The lines of `unetpp-fast bench`: inference and training steps by the implementations `SHOWN`.

    On a GPU the network is tuned first, and the report has the largest batch that trains.
    """
    network = network.to(device)
    level = max(network.topology.heads)
    chosen = {name: IMPLEMENTATIONS[name] for name in SHOWN}
    shape = tuple(size), batch, dtype
    kinds: list[tuple[str, str | None]] = [("inference", None), ("training", None)]
    kinds += [] if device.type == "cuda" else [("memory", "inference"), ("memory", "training")]
    cases = [Case(bench, "yours", level, "accurate", *shape, memory_of) for bench, memory_of in kinds]
    outcomes, largest = [], {}
    with progress.progress_bar(
        total=len(cases) * len(chosen), desc="measuring", unit="case", disable=None, leave=False
    ) as bar:
        if device.type == "cuda":
            with autocast(device, dtype), contextlib.suppress(RuntimeError):  # the outcomes give the reason
                dispatch.tune(network, make_input(network, cases[0], device)[0], progress=False)
        for case in cases:
            outcomes.append(measure(case, network, chosen, device, seconds=seconds, begin=lambda _: bar.update()))
        for name in outcomes[1].times if device.type == "cuda" else ():
            fits = functools.partial(batch_fits, network, chosen[name], cases[1], device)
            largest[name] = largest_batch(fits)
    where = f"{devices.device_name(device)}, torch {torch.__version__}"
    what = f"{'x'.join(map(str, size))}, batch {batch}, {dtype}, {network.gflop(size) * batch:,.1f} GFLOP forward"
    lines = [where, what, *table([row for outcome in outcomes for row in outcome.rows], largest)]
    for case, outcome in zip(cases, outcomes, strict=True):
        notes = {**outcome.skipped, **{name: f"WRONG, {reason}" for name, reason in outcome.wrong.items()}}
        lines += [f"{name}, {case.memory_of or case.bench}: {reason}" for name, reason in notes.items()]
    lines += [f"auto, {case.bench}: {choice(network, case, device)}" for case in cases if not case.memory_of]
    return list(dict.fromkeys(lines))


def choice(network: Network, case: Case, device: torch.device) -> str:
    """The backend that "auto" takes for a case, and why; on a CPU it also says where float32 would be faster."""
    network = with_backend(network, "auto").train(case.training)
    with autocast(device, case.dtype), torch.set_grad_enabled(case.training):
        name, reason = dispatch.choose(Call(network, make_input(network, case, device)[0]))
    return f"{name} ({reason})"


def table(rows: Iterable[Mapping], largest: Mapping[str, int]) -> list[str]:
    """A line per implementation: time, ratio to eager and memory of inference and training, and the largest batch."""
    kinds: dict[tuple, dict] = {(row["bench"], row.get("memory_of")): {} for row in rows}
    for row in rows:
        kinds[row["bench"], row.get("memory_of")][row["impl"]] = row
    lines = [f"{'':<20} {'inference ms':>13} {'eager / it':>11} {'MB':>7} {'training ms':>12} {'eager / it':>11} {'MB':>7} "
             f"{'largest batch':>14}"]  # fmt: skip
    for name in dict.fromkeys(row["impl"] for row in rows):
        cells = []
        for kind, width in (("inference", 13), ("training", 12)):
            timed, memory = (kinds.get(key, {}).get(name) for key in ((kind, None), ("memory", kind)))
            ratio = 1.0 if name == "eager" else timed and timed["ratio_to"].get("eager")
            peak = next((row["peak_mb"] for row in (timed, memory) if row and row["peak_mb"] is not None), None)
            cells += [_cell(timed and timed["median_ms"], width, 1), _cell(timed and ratio, 11, 2), _cell(peak, 7, 0)]
        lines.append(" ".join([f"{name:<20}", *cells, _cell(largest.get(name), 14, 0)]))
    return lines


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width},.{digits}f}"
