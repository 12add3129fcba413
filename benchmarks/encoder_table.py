"""smp's (segmentation_models_pytorch's) `UnetPlusPlus` on a CPU: `optimize` against smp's own module, compiled and exported.

`python benchmarks/encoder_table.py` measures every part, records the rows and prints the table. To measure some parts only,
name them: `python benchmarks/encoder_table.py resnet34-256 kept-resnet34-256`. `--print` measures nothing and prints what is
recorded. smp has to be installed; weights are random, nothing is downloaded.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace

import cpu_table
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from unetpp_fast.benchmarking import harness
from unetpp_fast.benchmarking.case import Case, Prepared
from unetpp_fast.benchmarking.implementations import IMPLEMENTATIONS
from unetpp_fast.common.errors import InputError
from unetpp_fast.common.extras import need
from unetpp_fast.converters.converter import convert
from unetpp_fast.deployment.optimized import optimize
from unetpp_fast.execution import dispatch

ENCODERS = ("resnet34", "efficientnet-b0", "resnet50", "mobilenet_v2")
SIZES = (512, 256)
IN_CHANNELS = 3
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
    outcome = harness.measure(case, Whole(smp_module(encoder)), {**chosen, OURS: ours}, cpu_table.CPU, rounds=rounds)
    for name, reason in {**outcome.skipped, **outcome.wrong}.items():
        print(f"{case}: {name} has no row: {reason}")
    return outcome.rows


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
    return alive.mb() if outputs is not None else 0.0


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
    return {f"{encoder}-{size}": partial(compared, encoder, size) for encoder in ENCODERS for size in SIZES}


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
    return cpu_table.markdown(rows, {name: found[name] for name in checks() if name in found}, cases, (OURS, *ALTERNATIVES))


if __name__ == "__main__":
    try:
        cpu_table.command(__doc__, parts(), checks(), table)
    except InputError as error:
        sys.exit(str(error))
