"""The matrix: which networks are measured, at which levels, sizes, batches and precisions, and the quick part of it.

Dropout is off in every network: with the paper's 0.5 the results of a training step could not be compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from unetpp_fast.architecture.precision import TRAINED
from unetpp_fast.benchmarking import peers
from unetpp_fast.benchmarking.case import Case
from unetpp_fast.benchmarking.implementations import measured_on
from unetpp_fast.converters.converter import convert
from unetpp_fast.models.architectures import PAPER_FEATURES, UNet, UNetPlusPlus
from unetpp_fast.models.network import Network

WIDTHS = PAPER_FEATURES["unet++"]
LEAKY = ("leaky_relu", {"negative_slope": 0.01})


def nested(**options) -> Network:
    """UNet++ with a head on every level."""
    return UNetPlusPlus(1, 1, features=WIDTHS, deep_supervision=True, **options)


MODELS: dict[str, Callable[[], Network]] = {
    "unet++": lambda: nested(norm=None),
    "unet++-bn-nearest": lambda: nested(norm="batch", upsample="nearest"),
    "unet++-bn-bilinear": lambda: nested(norm="batch", upsample=("linear", {"align_corners": True})),
    "unet": lambda: UNet(1, 1, features=PAPER_FEATURES["unet"], norm=None),
    "wide-unet": lambda: UNet(1, 1, features=PAPER_FEATURES["wide_unet"], norm=None),
    "monai-unet++": lambda: convert(peers.monai_module(1, 1, WIDTHS)),
    "smp-unet++": lambda: convert(peers.smp_module(3, 1)),
    "unet++-3d": lambda: nested(spatial_dims=3, norm="instance", act=LEAKY),
}
PRUNED = ("unet++", "unet++-bn-nearest", "unet++-bn-bilinear", "unet++-3d")  # measured at every level
CONVERTED = ("monai-unet++", "smp-unet++")
PLANES, VOLUMES = [(96, 96), (224, 224), (512, 512)], [(64, 64, 64)]
BATCHES = (1, 4, 16)


def network(case: Case) -> Network:
    """The network of a case, with seeded weights, pruned to its level.

    In mode "fast" it has the head of its level only, in mode "accurate" those of the shallower levels too.

    Raises:
        Unavailable: the library that it is converted from cannot be imported.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = MODELS[case.model]()
    if case.model not in PRUNED:
        return whole
    topology = whole.topology.pruned(case.level, keep_heads=case.mode == "accurate")
    return whole.subnetwork(topology, deep_supervision=case.mode == "accurate")


def levels(model: str) -> list[tuple[int, str]]:
    """The levels and modes of a model; at L1 both modes have the same head."""
    if model not in PRUNED:
        return [(4, "accurate" if model in CONVERTED else "fast")]
    return [(level, mode) for level in (1, 2, 3, 4) for mode in ("accurate", "fast") if (level, mode) != (1, "accurate")]


def matrix() -> list[tuple[Case, str]]:
    """Every case with every implementation."""
    pairs = []
    for model, dtype, batch in itertools.product(MODELS, TRAINED, BATCHES):
        for size, (level, mode) in itertools.product(VOLUMES if model.endswith("3d") else PLANES, levels(model)):
            rest = model, level, mode, size, batch, dtype
            cases = [Case("inference", *rest), Case("memory", *rest, "inference")]
            if level == 4 and (mode == "accurate" or model not in PRUNED):
                cases += [Case("training", *rest), Case("memory", *rest, "training")]
            pairs += itertools.product(cases, measured_on(model))
    return pairs


def quick() -> list[tuple[Case, str]]:
    """The part that runs in two minutes on two cores: the paper's network at the paper's size, and some other cases."""
    plain = ("eager", "eager-channels-last", "fused", "fused-triton", "fused-cuda", "fused-cpu")
    runtimes = ("compile", "onnxruntime", "openvino")
    small = (96, 96), 1, "float32"
    groups = [
        (Case("inference", "unet++", 4, "accurate", *small), (*plain, *runtimes)),
        *((Case("inference", "unet++", level, "fast", *small), plain) for level in (1, 2, 3, 4)),
        (Case("inference", "unet++", 4, "accurate", (96, 96), 1, "bfloat16"), plain),
        (Case("inference", "unet++-bn-nearest", 4, "fast", *small), plain),
        (Case("inference", "unet", 4, "fast", *small), plain),
        (Case("inference", "monai-unet++", 4, "accurate", *small), (*plain, "monai")),
        (Case("inference", "unet++-3d", 4, "fast", (32, 32, 32), 1, "float32"), plain),
        (Case("training", "unet++", 4, "accurate", *small), plain),
        (Case("memory", "unet++", 4, "accurate", *small, "inference"), (*plain, *runtimes[1:])),
        (Case("memory", "unet++", 4, "accurate", *small, "training"), plain[:4]),
    ]
    return [(case, name) for case, names in groups for name in names]
