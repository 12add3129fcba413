"""The matrix: which networks are measured, at which levels, sizes, batches and precisions, and the quick part of it.

Dropout is off in every network: the paper's 0.5 would make the results of a training step incomparable.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import unetpp_fast as uf
from unetpp_fast.benchmarking.harness import Case, Unavailable
from unetpp_fast.benchmarking.records import DTYPES
from unetpp_fast.models.architectures import PAPER_FEATURES
from unetpp_fast.models.network import Network

WIDTHS = PAPER_FEATURES["unet++"]
LEAKY = ("leaky_relu", {"negative_slope": 0.01})


def nested(**options) -> Network:
    """UNet++ with a head on every level."""
    return uf.UNetPlusPlus(1, 1, features=WIDTHS, deep_supervision=True, **options)


def monai(axes: int = 2) -> Network:
    """MONAI's own network, as ours: the same weights, the same outputs."""
    return convert(monai_module(axes))


def monai_module(axes: int = 2):
    """MONAI's UNet++ with instance norm, as MONAI builds it, one class and the paper's widths."""
    try:
        from monai.networks.nets import BasicUNetPlusPlus
    except ImportError as error:
        raise Unavailable("monai is not installed") from error
    return BasicUNetPlusPlus(axes, 1, 1, (*WIDTHS, WIDTHS[0]), deep_supervision=True)


def smp_module():
    """smp's UNet++ on a ResNet-34, with random weights."""
    try:
        from segmentation_models_pytorch import UnetPlusPlus
    except ImportError as error:
        raise Unavailable(f"segmentation_models_pytorch does not import: {error}") from error
    return UnetPlusPlus("resnet34", encoder_weights=None, in_channels=3, classes=1)


def convert(module) -> Network:
    """A peer's network as ours."""
    if not hasattr(uf, "convert"):
        raise Unavailable("this version has no unetpp_fast.convert, which gives both sides the same weights")
    return uf.convert(module)


MODELS: dict[str, Callable[[], Network]] = {
    "unet++": lambda: nested(norm=None),
    "unet++-bn-nearest": lambda: nested(norm="batch", upsample="nearest"),
    "unet++-bn-bilinear": lambda: nested(norm="batch", upsample=("linear", {"align_corners": True})),
    "unet": lambda: uf.UNet(1, 1, features=PAPER_FEATURES["unet"], norm=None),
    "wide-unet": lambda: uf.UNet(1, 1, features=PAPER_FEATURES["wide_unet"], norm=None),
    "monai-unet++": monai,
    "smp-unet++": lambda: convert(smp_module()),
    "unet++-3d": lambda: nested(spatial_dims=3, norm="instance", act=LEAKY),
}
DEEP = ("unet++", "unet++-bn-nearest", "unet++-bn-bilinear", "unet++-3d")  # those that are pruned
PLANES, VOLUMES = [(96, 96), (224, 224), (512, 512)], [(64, 64, 64)]
BATCHES = (1, 4, 16)
# The implementations of a case of ours; a peer's own networks stand beside them, where both have the same weights.
COMMON = (
    "eager", "eager-channels-last", "compile", "compile-max-autotune", "fused", "fused-triton", "fused-cuda",
    "fused-cpu", "onnxruntime", "openvino", "tensorrt",
)  # fmt: skip
PEERS = {"monai-unet++": ("monai",), "smp-unet++": ("smp",)}


def network(case: Case) -> Network:
    """The network of a case, with seeded weights, pruned to its level.

    "fast" has the one head of its level, "accurate" that and the shallower ones.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        whole = MODELS[case.model]()
    if case.model not in DEEP:
        return whole
    topology = whole.topology.pruned(case.level, keep_heads=case.mode == "accurate")
    return whole.subnetwork(topology, deep_supervision=case.mode == "accurate")


def levels(model: str) -> list[tuple[int, str]]:
    """The levels and modes of a model; at L1 both modes are one head."""
    if model not in DEEP:
        return [(4, "accurate" if model in PEERS else "fast")]
    return [(level, mode) for level in (1, 2, 3, 4) for mode in ("accurate", "fast") if (level, mode) != (1, "accurate")]


def matrix() -> list[tuple[Case, str]]:
    """Every case with every implementation."""
    found = []
    for model, dtype, batch in itertools.product(MODELS, DTYPES, BATCHES):
        for size, (level, mode) in itertools.product(VOLUMES if model.endswith("3d") else PLANES, levels(model)):
            rest = model, level, mode, size, batch, dtype
            cases = [Case("inference", *rest), Case("memory", *rest, "inference")]
            if level == 4 and (mode == "accurate" or model not in DEEP):
                cases += [Case("training", *rest), Case("memory", *rest, "training")]
            found += itertools.product(cases, (*COMMON, *PEERS.get(model, ())))
    return found


def quick() -> list[tuple[Case, str]]:
    """The part that runs in two minutes on two cores: the paper's network at the paper's size, and a little of the rest."""
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
