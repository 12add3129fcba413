"""smp's (segmentation_models_pytorch's) `UnetPlusPlus` on a CPU: `optimize` against smp's own module, compiled and exported.

`python benchmarks/encoder_table.py` measures every part, records the rows and prints the table. To measure some parts only,
name them: `python benchmarks/encoder_table.py resnet34-256 kept-resnet34-256`. `--print` measures nothing and prints what is
recorded; `--write` also writes the rows of `pruned-resnet34` into docs/encoders.md. smp has to be installed (for the pruned
networks timm alone); weights are random, nothing is downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cpu_table
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unetpp_fast.benchmarking import backends, harness, records
from unetpp_fast.benchmarking.case import Case, Prepared
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common import timing
from unetpp_fast.common.atomic_files import write_atomic
from unetpp_fast.common.errors import InputError
from unetpp_fast.common.extras import need
from unetpp_fast.converters.converter import convert
from unetpp_fast.deployment.optimized import optimize
from unetpp_fast.execution import dispatch
from unetpp_fast.models.architectures import UNetPlusPlus
from unetpp_fast.models.encoder_network import EncodedNetwork

ENCODERS = ("resnet34", "efficientnet-b0", "resnet50", "mobilenet_v2")
SIZES = (512, 256)
IN_CHANNELS = 3
CPU = cpu_table.CPU
PRUNED = "resnet34"
PRUNED_CASE = Case("inference", f"unet++-{PRUNED}", 4, "fast", (512, 512), 1, "float32")
PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"
BEGIN, END = "<!-- pruned: from here on written by `encoder_table.py --write` -->", "<!-- pruned: up to here -->"
OURS, ALTERNATIVES = "fused", ("eager-channels-last", "compile", "onnxruntime", "openvino")


class Whole(nn.Module):
    """Another library's own module, with what the harness asks of a network beside."""

    backend = "reference"

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.out_channels = module, 1
        self.topology = SimpleNamespace(in_channels=IN_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)

    def gflop(self, size: Sequence[int]) -> float:
        """10^9 floating-point operations of its convolutions for one image."""
        with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
            copy.deepcopy(self.module).to("meta").eval()(torch.empty(1, IN_CHANNELS, *size))
        return counter.get_total_flops() / 1e9


def smp_module(encoder: str) -> nn.Module:
    """smp's network over an encoder with seeded weights.

    Raises:
        InputError: smp is missing; the message gives the command that installs it.
    """
    smp = need("segmentation_models_pytorch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return smp.UnetPlusPlus(encoder, encoder_weights=None, in_channels=IN_CHANNELS, classes=1).eval()


def ours(network: Whole, x: Tensor, case: Case) -> Prepared:
    """What `optimize` makes of the module."""
    return Prepared(optimize(network.module, dtype=case.torch_dtype), x, capturable=False)


def case_of(encoder: str, size: int) -> Case:
    return Case("inference", f"smp-unet++-{encoder}", 4, "accurate", (size, size), 1, "float32")


def compared(encoder: str, size: int, rounds: int) -> list[dict]:
    """The rows of one encoder and size; prints which implementations have none, and why."""
    case, chosen = case_of(encoder, size), {name: IMPLEMENTATIONS[name] for name in ALTERNATIVES}
    outcome = harness.measure(case, Whole(smp_module(encoder)), {**chosen, OURS: ours}, CPU, rounds=rounds)
    for name, reason in {**outcome.skipped, **outcome.wrong}.items():
        print(f"{case}: {name} has no row: {reason}")
    return outcome.rows


def own_network() -> EncodedNetwork:
    """Ours over timm's encoder, with a head on every column and seeded weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNetPlusPlus(IN_CHANNELS, 1, encoder=PRUNED, deep_supervision=True).eval()


def pruned(rounds: int) -> list[dict]:
    """The rows of the network's pruned forms, timed in interleaved runs: as `optimize` makes them and by eager PyTorch."""
    whole, eager, case = own_network(), ALTERNATIVES[0], PRUNED_CASE
    networks = {level: whole.prune(level) for level in whole.topology.heads}
    x = torch.randn(1, IN_CHANNELS, *case.size, generator=torch.Generator().manual_seed(0))
    runs = {}
    for level, network in networks.items():
        fast, usual = optimize(network, dtype=torch.float32), backends.eager(network, x, case, True)
        runs[OURS, level], runs[eager, level] = partial(fast, x), partial(usual.forward, usual.x)
    with torch.no_grad():
        times = timing.interleaved_times({f"{impl} {level}": run for (impl, level), run in runs.items()}, CPU, rounds=rounds)
    rows = []
    for level, network in networks.items():
        mine = {impl: times[f"{impl} {level}"] for impl in (OURS, eager)}
        rows += harness.rows_of(dataclasses.replace(case, level=level), CPU, mine, {}, network.gflop(case.size))
    return rows


def pruned_table(rows: Sequence[Mapping]) -> str:
    """A row for each level that was recorded: its operations and times, and those as a share of the deepest level's."""
    size = "x".join(map(str, PRUNED_CASE.size))
    lines = [
        f"| {PRUNED}, {size} | GFLOP | of the whole | `optimize`, ms | of the whole | eager, ms |",
        "| --- |" + " --- |" * 5,
    ]
    levels = {}
    for row in rows:
        if cpu_table.of_case(row, dataclasses.replace(PRUNED_CASE, level=row["level"])):
            levels.setdefault(row["level"], {})[row["impl"]] = row
    shown = {level: impls for level, impls in sorted(levels.items()) if OURS in impls}
    if not shown:
        return "No pruned networks are recorded on this machine."
    gflop = {level: impls[OURS]["tflops"] * impls[OURS]["median_ms"] for level, impls in shown.items()}
    deepest = max(shown)
    for level, impls in shown.items():
        ours = impls[OURS]["median_ms"]
        usual = f"{impls[ALTERNATIVES[0]]['median_ms']:.0f}" if ALTERNATIVES[0] in impls else ""
        shares = gflop[level] / gflop[deepest], ours / shown[deepest][OURS]["median_ms"]
        old = "" if records.is_current(impls[OURS]) else " †"
        lines.append(
            f"| `prune({level})` | {gflop[level]:.1f} | {shares[0]:.2f} | {ours:.0f}{old} | {shares[1]:.2f} | {usual} |"
        )
    facts = shown[deepest][OURS]
    text = "\n".join(lines)
    return f"{text}\n\nOne image, float32, {facts['device']}, medians.{records.legend(text)}"


def write(page: Path, rows: Sequence[Mapping]) -> None:
    """Writes `pruned_table` between the markers of a page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page} lacks the lines {BEGIN} and {END}")
    text = f"{before}{begin}\n{pruned_table(rows)}\n{end}{after}"
    write_atomic(page, lambda stream: stream.write(text.encode()))


class Alive(TorchDispatchMode):
    """Knows the memory of the tensors that were made inside it, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        result = func(*args, **(kwargs or {}))
        for one in tree_leaves(result):
            if isinstance(one, Tensor) and (storage := one.untyped_storage())._cdata not in given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result

    def mb(self) -> float:
        """MB (10^6 bytes) of those that live."""
        return sum(size for storage, size in self.made.values() if not storage.expired()) / 1e6


def kept_mb(network: nn.Module, x: Tensor) -> float:
    """MB of the tensors that live between the forward and the backward pass of a training step, parameters and the image
    apart."""
    with Alive() as alive:
        outputs = network.train()(x)
    mb = alive.mb()
    del outputs  # until here they hold what the backward pass needs
    return mb


def kept(encoder: str, size: int) -> dict[str, float]:
    """MB that a training step keeps, and ours as a share of smp's."""
    module = smp_module(encoder)
    network = convert(module)
    network.backend = "cpu" if dispatch.CPU_KERNELS[0] else "reference"
    x = torch.randn(1, IN_CHANNELS, size, size, generator=torch.Generator().manual_seed(0))
    mine, theirs = kept_mb(network, x), kept_mb(module, x)
    return {"ours": mine, "smp": theirs, "share": mine / theirs}


def parts() -> dict[str, Callable[[int], list[dict]]]:
    """What gives rows, by name: functions of the number of rounds."""
    known = {f"{encoder}-{size}": partial(compared, encoder, size) for encoder in ENCODERS for size in SIZES}
    return {**known, f"pruned-{PRUNED}": pruned}


def checks() -> dict[str, Callable[[int, int], dict[str, float]]]:
    """As `cpu_table.checks`."""
    return {
        f"kept-{encoder}-{size}": lambda *_, encoder=encoder, size=size: kept(encoder, size)
        for encoder in ENCODERS
        for size in SIZES
    }


def table(rows: Sequence[Mapping], found: Mapping[str, Mapping]) -> str:
    """As `cpu_table.table`."""
    cases = [case_of(encoder, size) for encoder in ENCODERS for size in SIZES]
    mine = {name: found[name] for name in checks() if name in found}
    return f"{cpu_table.markdown(rows, mine, cases, (OURS, *ALTERNATIVES))}\n\n{pruned_table(rows)}"


if __name__ == "__main__":
    try:
        if "--write" in sys.argv:
            sys.argv[sys.argv.index("--write")] = "--print"
            write(PAGE, records.read(records.RESULTS / f"{records.machine(CPU)}.json"))
        cpu_table.command(__doc__, parts(), checks(), table)
    except InputError as error:
        sys.exit(str(error))
